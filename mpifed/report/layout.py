"""A table, whatever is in it, as aligned text, as Markdown and as LaTeX."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Literal

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    '"': "''",
    "–": "--",
    "×": r"$\times$",
    "α": r"$\alpha$",
    "μ": r"$\mu$",
    "…": r"\dots{}",
}


@dataclass(frozen=True)
class Cell:
    """Text of one cell; `strong`: the best of its column; `aside`: of less weight, such as somebody else's number."""

    text: str
    strong: bool = False
    aside: bool = False


@dataclass(frozen=True)
class Table:
    """A title, a header, rows as long as it, and remarks beneath. `left`: how many columns are aligned to the left.

    `columns_title` stands above the columns after the `left` ones; `label` is for references in LaTeX; `strong` says
    what is marked as strong.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    left: int = 1
    columns_title: str = ""
    label: str = ""
    strong: str = ""


def as_text(table: Table) -> str:
    """Columns at least two blanks apart, a rule below the header; a star behind what is strong."""
    starred = [any(row[column].strong for row in table.rows) for column in range(len(table.header))]
    rows = [[text + " " * star for text, star in zip(table.header, starred, strict=True)]]
    for row in table.rows:
        rows.append([cell.text + star * ("*" if cell.strong else " ") for cell, star in zip(row, starred, strict=True)])
    lines = aligned(rows, range(table.left))
    if table.columns_title:
        *_, blank = re.split(r"-(?=  )", lines[1], maxsplit=table.left)
        lines.insert(0, " " * (len(lines[1]) - len(blank) + 2) + table.columns_title)
    notes = [*([f"*: {table.strong}."] if any(starred) else []), *table.notes]
    return "\n".join(
        [
            table.title,
            *lines,
            *(textwrap.fill(note, 110, initial_indent="  ", subsequent_indent="  ") for note in notes),
        ]
    )


def aligned(rows: Sequence[Sequence[str]], left: Container[int]) -> list[str]:
    """Lines of aligned cells, two blanks apart; after the first, a rule. The columns `left` are aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def as_markdown(table: Table) -> str:
    """A heading of the third level, a pipe table, and the remarks as a paragraph."""
    header = list(table.header)
    if table.columns_title:
        header[table.left :] = [f"{table.columns_title} = {text}" for text in header[table.left :]]
    rule = ["---" if column < table.left else "--:" for column in range(len(header))]
    rows = [header, rule, *([_markdown(cell) for cell in row] for row in table.rows)]
    lines = [markdown_row(row) for row in rows]
    notes = ["", *(f"{note}  " for note in _notes(table))] if table.notes else []
    return "\n".join([f"### {table.title}", "", *lines, *notes])


def _notes(table: Table) -> list[str]:
    """The remarks, with what bold type means."""
    bold = any(cell.strong for row in table.rows for cell in row)
    return [*table.notes, *([f"Bold: {table.strong}."] if bold else [])]


def markdown_row(row: Sequence[str]) -> str:
    """One line of a pipe table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _markdown(cell: Cell) -> str:
    if not cell.text.strip():
        return ""
    return f"**{cell.text}**" if cell.strong else f"*{cell.text.strip()}*" if cell.aside else cell.text


def as_latex(table: Table) -> str:
    """A `table` with rules of the package booktabs; the caption holds title and remarks."""
    columns = len(table.header)
    span = ""
    if table.columns_title:
        first = table.left + 1
        blanks = "& " * table.left
        title = latex(table.columns_title)
        span = f"{blanks}\\multicolumn{{{columns - table.left}}}{{c}}{{{title}}} \\\\\n"
        span += f"\\cmidrule(lr){{{first}-{columns}}}\n"
    caption = " ".join(latex(text.rstrip(".") + ".") for text in (table.title, *_notes(table)))
    rows = [" & ".join(map(_latex, row)) + r" \\" for row in table.rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{caption}}}",
            *([f"\\label{{tab:{table.label}}}"] if table.label else []),
            f"\\begin{{tabular}}{{{'l' * table.left}{'r' * (columns - table.left)}}}",
            r"\toprule",
            span + " & ".join(latex(text) for text in table.header) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _latex(cell: Cell) -> str:
    text = latex(cell.text.strip())
    if not text:
        return ""
    return f"\\textbf{{{text}}}" if cell.strong else f"\\textit{{{text}}}" if cell.aside else text


def latex(text: str) -> str:
    """Plain text as LaTeX shows it: what is special there is escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


Form = Literal["text", "markdown", "latex"]
RENDER: dict[Form, Callable[[Table], str]] = {"text": as_text, "markdown": as_markdown, "latex": as_latex}
