"""What the pages say about files, jobs and exit codes is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpifed import errors
from mpifed.job import load

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_job_in_the_readme_is_valid() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    job = load(text, [], "README.md")
    assert (job.algorithm.name, job.clients, job.data.partition.name) == ("fedprox", 100, "dirichlet")


def test_the_exit_codes_are_those_of_the_program() -> None:
    """The table of `mpifed/errors.py`, code by code, and no other code."""
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README, flags=re.MULTILINE))
    said = dict(re.findall(r"^\| (\d+) \| (.+) \|$", errors.__doc__ or "", flags=re.MULTILINE))
    assert rows.keys() == said.keys()
    for code, meaning in rows.items():
        assert said[code].startswith(meaning)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name}: {missing}"
