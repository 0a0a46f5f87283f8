"""Text sources: files as published become token ids; what is malformed is named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpifed.algorithms.base import Env
from mpifed.comm.inprocess import InProcess
from mpifed.data.source import ArraySource
from mpifed.data.text import ade_corpus, sms_spam, sst2, tokenise, trec, vocabulary_of
from mpifed.errors import BadInput
from mpifed.federation.federation import Federation
from mpifed.types import DataSpec
from tests.algorithm_table import job_of

TREC = {
    "trec/train_5500.label": "LOC:city Where is Rome ?\nNUM:date When was Rome founded ?\nDESC:def What is Rome ?\n",
    "trec/TREC_10.label": "ABBR:exp What is NATO ?\nHUM:ind Who founded Rome ?\n",
}
SST2 = {
    "SST-2/train.tsv": "sentence\tlabel\na joy \t1\ntoo long \t0\n",
    "SST-2/dev.tsv": "sentence\tlabel\na bore \t0\n",
    "SST-2/test.tsv": "index\tsentence\n0\ta joy\n",
}
SMS = {"sms_spam/SMSSpamCollection": "".join(f"{'spam' if i % 4 == 0 else 'ham'}\tcall {i} £\n" for i in range(40))}
ADE = {
    "ade_corpus_v2/DRUG-AE.rel": "".join(
        f"{i}|Drug {i} caused a rash.|rash|1|2|drug|{effect}|4\n" for i in range(20) for effect in (1, 2)
    ),
    "ade_corpus_v2/ADE-NEG.txt": "".join(f"{i} NEG No effect of {i}.\n" for i in range(30)),
}
Make = Callable[..., ArraySource]
ALL: list[tuple[Make, dict[str, str]]] = [(trec, TREC), (sst2, SST2), (sms_spam, SMS), (ade_corpus, ADE)]


def write(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return str(root)


# --- tokens and vocabulary --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't STOP, it's 4.5!", ["don't", "stop", ",", "it's", "4", ".", "5", "!"]),
        ("does n't 'quote' ``x''", ["does", "n't", "'", "quote", "'", "`", "`", "x", "'", "'"]),
        ("£1.50 Ünïcode\u00a0—\u2028end", ["£", "1", ".", "50", "ünïcode", "—", "end"]),
        (" \t ", []),
    ],
)
def test_tokenise(text: str, tokens: list[str]) -> None:
    assert tokenise(text) == tokens


def test_the_vocabulary_is_by_frequency_then_alphabet() -> None:
    """b three times, a and c twice, d once; ids from 2."""
    texts = [["c", "b", "a"], ["b", "a", "c", "b", "d"]]
    assert vocabulary_of(texts, 1, 10) == {"b": 2, "a": 3, "c": 4, "d": 5}
    assert vocabulary_of(texts, 2, 10) == {"b": 2, "a": 3, "c": 4}
    assert vocabulary_of(texts, 1, 4) == {"b": 2, "a": 3}
    assert vocabulary_of(texts, 4, 10) == {}


# --- the data sets ----------------------------------------------------------------------------------------------------
def test_trec_by_hand(tmp_path: Path) -> None:
    """Training tokens: ? and rome three times, is twice, the others once; so ? 2, rome 3, is 4, and then founded 5,
    was 6, what 7, when 8, where 9. Of the test set nato and who are unknown, 1; a third word is cut at length 3."""
    source = trec(root=write(tmp_path, TREC), min_count=1, length=5)
    assert source.spec == DataSpec((5,), 6, vocabulary=10) and source.train_owner is None
    x, y = source.take("train", np.array([1, 0]))
    assert x.dtype == torch.int32 and y.dtype == torch.int64
    assert x.tolist() == [[8, 6, 3, 5, 2], [9, 4, 3, 2, 0]] and y.tolist() == [5, 4]
    x, y = source.take("test", np.array([0, 1]))
    assert x.tolist() == [[7, 4, 1, 2, 0], [1, 5, 3, 2, 0]] and y.tolist() == [0, 3]
    short = trec(root=str(tmp_path), min_count=2, length=3)
    assert short.spec.vocabulary == 5
    assert short.take("train", np.array([0]))[0].tolist() == [[1, 4, 3]]


def test_text_becomes_int64_model_input_and_images_stay_float32(tmp_path: Path) -> None:
    source = trec(root=write(tmp_path, TREC), min_count=1)
    x, _ = source.take("train", np.arange(3))
    assert source.spec.dtype == torch.int64
    made = source.spec.standardise(x)
    assert made.dtype == torch.int64 and torch.equal(made, x.long())
    image = DataSpec((1, 1, 2), 2, (0.5,), (0.5,))
    assert image.dtype == torch.float32
    assert image.standardise(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist() == [[[[-1.0, 1.0]]]]


def test_sst2_is_read_in_both_forms(tmp_path: Path) -> None:
    """GLUE's test set has no labels: its development set is the test set. Where test.tsv has them, dev is training."""
    source = sst2(root=write(tmp_path, SST2), min_count=1)
    assert source.train_labels.tolist() == [1, 0] and source.test_labels.tolist() == [0]
    write(tmp_path, {"SST-2/test.tsv": "sentence\tlabel\nso long \t0\nfun \t1\n"})
    source = sst2(root=str(tmp_path), min_count=1)
    assert source.train_labels.tolist() == [1, 0, 0] and source.test_labels.tolist() == [0, 1]
    (tmp_path / "text/SST-2/test.tsv").unlink()
    assert sst2(root=str(tmp_path), min_count=1).test_labels.tolist() == [0]


def test_ade_counts_a_sentence_once_however_many_effects_it_tells_of(tmp_path: Path) -> None:
    """20 positive and 30 negative sentences; a fifth of each, 4 and 6, is the test set."""
    source = ade_corpus(root=write(tmp_path, ADE))
    assert np.bincount(source.train_labels).tolist() == [24, 16] and np.bincount(source.test_labels).tolist() == [6, 4]


@pytest.mark.parametrize(("make", "files"), [(sms_spam, SMS), (ade_corpus, ADE)])
def test_the_split_is_a_function_of_the_seed(make: Make, files: dict[str, str], tmp_path: Path) -> None:
    root = write(tmp_path, files)
    a, b, other = (make(root=root, seed=seed, min_count=1).train_samples for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, other)
    half = make(root=root, test_share=0.5)
    assert len(half.test_labels) == len(half.train_labels)


def test_copies_of_a_text_are_on_one_side(tmp_path: Path) -> None:
    """Each of ten messages three times: by chance, all would be on one side in one of very many seeds."""
    root = write(tmp_path, {"sms_spam/SMSSpamCollection": "".join(f"ham\tnumber {i}\n" for i in range(10)) * 3})
    for seed in range(5):
        source = sms_spam(root=root, seed=seed, min_count=1, test_share=0.3)
        assert len(source.test_labels) == 9
        known = {tuple(row) for row in source.train_samples.tolist()}
        assert len(known) == 7 and len(source.train_labels) == 21
        assert (source.test_samples == 1).any(axis=1).all()  # their numbers were never seen


def test_carriage_returns_and_unicode_line_ends_are_no_lines(tmp_path: Path) -> None:
    root = write(tmp_path, {"sms_spam/SMSSpamCollection": "ham\tone\u2028two\x85\r\nspam\tthree\r\nham\tx\nspam\ty"})
    source = sms_spam(root=root, test_share=0.5, min_count=1)
    assert len(source.train_labels) + len(source.test_labels) == 4


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "files", "name", "line", "wrong"),
    [
        (trec, TREC, "trec/train_5500.label", 2, "FOOD:x What ?"),
        (trec, TREC, "trec/train_5500.label", 2, "NUM When ?"),
        (trec, TREC, "trec/TREC_10.label", 1, "NUM:date  "),
        (sst2, SST2, "SST-2/train.tsv", 1, "label\tsentence"),
        (sst2, SST2, "SST-2/train.tsv", 3, "too long 0"),
        (sst2, SST2, "SST-2/dev.tsv", 2, "a bore \t2"),
        (sms_spam, SMS, "sms_spam/SMSSpamCollection", 7, "eggs\tcall"),
        (sms_spam, SMS, "sms_spam/SMSSpamCollection", 7, "ham call"),
        (sms_spam, SMS, "sms_spam/SMSSpamCollection", 7, ""),
        (ade_corpus, ADE, "ade_corpus_v2/DRUG-AE.rel", 3, "1|a rash|rash|1|2|drug|3"),
        (ade_corpus, ADE, "ade_corpus_v2/DRUG-AE.rel", 3, "1| |rash|1|2|drug|3|4"),
        (ade_corpus, ADE, "ade_corpus_v2/ADE-NEG.txt", 30, "29 POS No effect."),
    ],
)
def test_a_malformed_line_is_named(
    make: Make, files: dict[str, str], name: str, line: int, wrong: str, tmp_path: Path
) -> None:
    lines = files[name].split("\n")
    lines[line - 1] = wrong
    root = write(tmp_path, files | {name: "\n".join(lines)})
    with pytest.raises(BadInput, match=rf"data\.root: .*{re.escape(name)}, line {line}, "):
        make(root=root)


@pytest.mark.parametrize(("make", "files"), ALL)
def test_a_missing_an_empty_and_an_undecodable_file_are_named(
    make: Make, files: dict[str, str], tmp_path: Path
) -> None:
    root = write(tmp_path, files)
    name = next(iter(files))
    path = tmp_path / "text" / name
    path.write_bytes(b"")
    with pytest.raises(BadInput, match=rf"data\.root: .*{re.escape(name)}, line 1, "):
        make(root=root)
    if make is not trec:  # latin-1, as published, where any byte is a character
        path.write_bytes(b"\xff\n")
        with pytest.raises(BadInput, match=rf"data\.root: .*{re.escape(name)} is not text in utf-8"):
            make(root=root)
    path.unlink()
    with pytest.raises(BadInput, match=rf"data\.root: there is no file .*{re.escape(name)}"):
        make(root=root)


def test_a_header_alone_is_no_data(tmp_path: Path) -> None:
    root = write(tmp_path, SST2 | {"SST-2/dev.tsv": "sentence\tlabel\n"})
    with pytest.raises(BadInput, match=r"data\.root: .*dev\.tsv holds no sentence"):
        sst2(root=root)


def test_keys_that_leave_nothing(tmp_path: Path) -> None:
    root = write(tmp_path, TREC | SMS)
    with pytest.raises(BadInput, match=r"data\.min_count = 100"):
        trec(root=root, min_count=100)
    with pytest.raises(BadInput, match=r"data\.test_share = 0\.001"):
        sms_spam(root=root, test_share=0.001)


@pytest.mark.parametrize(
    "wrong", [{"length": 0}, {"min_count": 0}, {"max_vocabulary": 2}, {"test_share": 1.0}, {"seed": -1}]
)
def test_keys_of_a_job_are_checked(wrong: dict[str, Any]) -> None:
    from mpifed.component import bind

    (key,) = wrong
    with pytest.raises(BadInput, match=rf"data\.{key}"):
        bind(sms_spam, json.loads(json.dumps(wrong)), "data")


def test_a_public_set_of_texts_is_a_part_of_the_private_ones(tmp_path: Path) -> None:
    """Of 40 messages, a fifth is the test set and half of the others public. Another data set cannot be, not even
    another text: the same id would be another word."""
    data = {"name": "sms_spam", "root": write(tmp_path, SMS), "partition": {"name": "iid"}}
    net = {"name": "transformer", "layers": 1, "width": 4, "heads": 1, "feedforward": 4}

    def env_of(**changes: Any) -> Env:
        job = job_of({"name": "fedavg"}, clients=2, participation=1.0, model=net, data=data | changes)
        return Federation.build(job, InProcess.alone()).env

    public = env_of(public_held_out=0.5).public
    assert public is not None and len(public) == 16
    x = public.x(torch.arange(16))
    assert x.dtype == torch.int64 and x.shape == (16, 48)
    with pytest.raises(BadInput, match=r"data\.public\.name: 'sms_spam' beside 'sms_spam'"):
        env_of(public={"name": "sms_spam"})


# --- the real files, where they are -----------------------------------------------------------------------------------
REAL: list[tuple[Make, str, list[int], list[int]]] = [
    (trec, "trec", [86, 1162, 1250, 1223, 835, 896], [9, 138, 94, 65, 81, 113]),
    (sst2, "SST-2", [29_780, 37_569], [428, 444]),
    (sms_spam, "sms_spam", [3_860, 601], [967, 146]),
    (ade_corpus, "ade_corpus_v2", [13_364, 3_417], [3_331, 854]),
]
REAL_ROOT = Path(os.environ.get("MPIFED_DATA") or os.devnull) / "text"
if REAL_HERE := [row for row in REAL if (REAL_ROOT / row[1]).is_dir()]:

    @pytest.mark.parametrize(("make", "folder", "train", "test"), REAL_HERE)
    def test_real_files_have_the_published_sizes(make: Make, folder: str, train: list[int], test: list[int]) -> None:
        """TREC 5,452 + 500, SST-2 67,349 + 872; SMS 4,827 + 747 and ADE 16,695 + 4,271 in both parts; few unknowns."""
        source = make()
        assert np.bincount(source.train_labels).tolist() == train and np.bincount(source.test_labels).tolist() == test
        words = source.test_samples[source.test_samples != 0]
        assert (words == 1).mean() < 0.15 and source.train_samples.max() == source.spec.vocabulary - 1
