"""Labelled sentences as token ids: ADE, SST-2, TREC and the SMS spam collection, from their published text files.

A token is a word in lower case or one punctuation mark. The vocabulary is that of the training part, the most frequent
tokens first; id 0 is padding and id 1 any other token. Texts are cut, or filled up with 0, to one length.

- `ade_corpus`: Gurulingappa et al., "Development of a benchmark corpus to support the automatic extraction of
  drug-related adverse effects from medical case reports", J. Biomedical Informatics 45, 2012.
- `sst2`: Socher et al., "Recursive deep models for semantic compositionality over a sentiment treebank", EMNLP 2013; in
  GLUE's form.
- `trec`: Li, Roth, "Learning question classifiers", COLING 2002.
- `sms_spam`: Almeida, Gómez Hidalgo, Yamakami, "Contributions to the study of SMS spam filtering", DocEng 2011.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from mpifed.data.source import ArraySource, data_root
from mpifed.errors import BadInput
from mpifed.types import PADDING, UNKNOWN, DataSpec

Length = Annotated[int, Field(ge=1)]
MinCount = Annotated[int, Field(ge=1)]
VocabularySize = Annotated[int, Field(ge=3, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

_TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")

Sentence = tuple[str, int]
"""A text and its label."""


# --- the data sets ----------------------------------------------------------------------------------------------------
def ade_corpus(
    *,
    root: str = "",
    length: Length = 64,
    min_count: MinCount = 2,
    max_vocabulary: VocabularySize = 20_000,
    test_share: Share = 0.2,
    seed: Seed = 0,
) -> ArraySource:
    """20,966 sentences of case reports in `root/text/ade_corpus_v2`: do they tell of an adverse effect; 2 classes.

    Class 1 are the 4,271 sentences of `DRUG-AE.rel`, class 0 the 16,695 of `ADE-NEG.txt`. `test_share` of each class,
    drawn by `seed`, is the test set; a sentence that occurs twice is on one side. `length`, `min_count` and
    `max_vocabulary` (the two reserved ids included) rule the tokens. Raises `BadInput` naming key, file and line.
    """
    folder = data_root(root) / "text" / "ade_corpus_v2"
    positive = dict.fromkeys(_read(folder / "DRUG-AE.rel", _ADE_RELATION))  # a line for each drug and effect
    sentences = [*positive, *_read(folder / "ADE-NEG.txt", _ADE_NEGATIVE)]
    train, test = _split(sentences, test_share, seed)
    return _source(train, test, 2, length, min_count, max_vocabulary)


def sst2(
    *, root: str = "", length: Length = 48, min_count: MinCount = 2, max_vocabulary: VocabularySize = 20_000
) -> ArraySource:
    """67,349 + 872 phrases and sentences of film reviews in `root/text/SST-2`: negative or positive; 2 classes.

    GLUE's training and development set, since its test labels are not published: `train.tsv` and `dev.tsv`. Where
    `test.tsv` has labels, it is GLUE's development set, and `dev.tsv` a part of the training set. Otherwise as
    `ade_corpus`.
    """
    folder = data_root(root) / "text" / "SST-2"
    train, dev = (_read(folder / name, _SST2) for name in ("train.tsv", "dev.tsv"))
    test = folder / "test.tsv"
    if test.is_file() and _lines(test, _SST2.encoding)[0] == _SST2.header:
        return _source(train + dev, _read(test, _SST2), 2, length, min_count, max_vocabulary)
    return _source(train, dev, 2, length, min_count, max_vocabulary)


def trec(
    *, root: str = "", length: Length = 32, min_count: MinCount = 2, max_vocabulary: VocabularySize = 20_000
) -> ArraySource:
    """5,452 + 500 questions in `root/text/trec`: what kind of thing is asked for; 6 classes.

    They are abbreviation, description, entity, human, location and number, in this order. Otherwise as `ade_corpus`.
    """
    folder = data_root(root) / "text" / "trec"
    train, test = (_read(folder / name, _TREC) for name in ("train_5500.label", "TREC_10.label"))
    return _source(train, test, len(_TREC.labels), length, min_count, max_vocabulary)


def sms_spam(
    *,
    root: str = "",
    length: Length = 48,
    min_count: MinCount = 2,
    max_vocabulary: VocabularySize = 20_000,
    test_share: Share = 0.2,
    seed: Seed = 0,
) -> ArraySource:
    """5,574 short messages in `root/text/sms_spam`, 747 of them spam, class 1; 2 classes; as `ade_corpus` otherwise."""
    folder = data_root(root) / "text" / "sms_spam"
    train, test = _split(_read(folder / "SMSSpamCollection", _SMS), test_share, seed)
    return _source(train, test, 2, length, min_count, max_vocabulary)


# --- files ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Format:
    """How a file is written: a pattern for every line, with a group `text` and a group `label`, one of `labels`.

    Without `labels`, all lines have the label `only`.
    """

    pattern: re.Pattern[str]
    written: str
    labels: tuple[str, ...] = ()
    only: int = 0
    header: str = ""
    encoding: str = "utf-8"


_SST2 = _Format(
    re.compile(r"(?P<text>.*\S.*)\t(?P<label>[01])"), "a sentence, a tab, 0 or 1", ("0", "1"), header="sentence\tlabel"
)
_TREC = _Format(
    re.compile(r"(?P<label>ABBR|DESC|ENTY|HUM|LOC|NUM):\S+ (?P<text>.*\S.*)"),
    "CLASS:kind, a space, a question, with CLASS one of ABBR, DESC, ENTY, HUM, LOC, NUM",
    ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
    encoding="latin-1",
)
_SMS = _Format(re.compile(r"(?P<label>ham|spam)\t(?P<text>.*\S.*)"), "ham or spam, a tab, a message", ("ham", "spam"))
_ADE_RELATION = _Format(
    re.compile(r"\d+\|(?P<text>[^|]*[^|\s][^|]*)(?:\|[^|]*){6}"),
    "a PubMed id, a sentence and six more columns, between bars",
    only=1,
)
_ADE_NEGATIVE = _Format(re.compile(r"\d+ NEG (?P<text>.*\S.*)"), "a PubMed id, NEG and a sentence, between spaces")


def _read(path: Path, form: _Format) -> list[Sentence]:
    """The file's sentences in order. Raises `BadInput` naming `data.root`, the file, and the line that is wrong."""
    lines = _lines(path, form.encoding)
    if form.header and lines[0] != form.header:
        raise BadInput(f"data.root: {path}, line 1, is not the header {form.header!r}; replace the file")
    sentences = []
    for number, line in enumerate(lines, start=1):
        if form.header and number == 1:
            continue
        match = form.pattern.fullmatch(line)
        if match is None:
            shown = line if len(line) <= 60 else line[:57] + "..."
            raise BadInput(f"data.root: {path}, line {number}, is {shown!r}, not {form.written}; replace the file")
        label = form.labels.index(match["label"]) if form.labels else form.only
        sentences.append((match["text"].strip(), label))
    if not sentences:
        raise BadInput(f"data.root: {path} holds no sentence; replace the file")
    return sentences


def _lines(path: Path, encoding: str) -> list[str]:
    """Lines as `\\n` parts them (`splitlines` would also break at what Unicode takes for an end of line)."""
    if not path.is_file():
        raise BadInput(
            f"data.root: there is no file {path}; unpack the data set there, or point data.root or MPIFED_DATA at the "
            "folder that holds text/"
        )
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise BadInput(f"data.root: {path} is not text in {encoding} ({error}); replace the file") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


# --- sentences to samples ---------------------------------------------------------------------------------------------
def tokenise(text: str) -> list[str]:
    """Words in lower case (with what follows an apostrophe) and punctuation marks: "Don't!" -> "don't", "!"."""
    return _TOKEN.findall(text.lower())


def vocabulary_of(texts: Iterable[Sequence[str]], min_count: int, max_size: int) -> dict[str, int]:
    """Ids from 2 for the tokens that occur `min_count` times: the most frequent first, equals in alphabetical order.

    At most `max_size` ids, padding and unknown included.
    """
    counts = Counter(token for tokens in texts for token in tokens)
    frequent = sorted((-count, token) for token, count in counts.items() if count >= min_count)
    return {token: number for number, (_, token) in enumerate(frequent[: max_size - 2], start=2)}


def _split(sentences: Sequence[Sentence], share: float, seed: int) -> tuple[list[Sentence], list[Sentence]]:
    """Training and test part, in the given order: `share` of each class's distinct texts is test, with their copies."""
    rng = np.random.Generator(np.random.PCG64(seed))
    first: dict[str, int] = {}
    for text, label in sentences:
        first.setdefault(text, label)
    test: set[str] = set()
    for label in sorted(set(first.values())):
        texts = [text for text, its in first.items() if its == label]
        test.update(texts[index] for index in rng.permutation(len(texts))[: round(share * len(texts))])
    parts = [[pair for pair in sentences if (pair[0] in test) == wanted] for wanted in (False, True)]
    if not all(parts):
        raise BadInput(f"data.test_share = {share} of {len(first)} texts leaves none to train on, or none to test")
    return parts[0], parts[1]


def _source(
    train: Sequence[Sentence], test: Sequence[Sentence], classes: int, length: int, min_count: int, max_vocabulary: int
) -> ArraySource:
    tokens = {part: [tokenise(text) for text, _ in sentences] for part, sentences in (("train", train), ("test", test))}
    vocabulary = vocabulary_of(tokens["train"], min_count, max_vocabulary)
    if not vocabulary:
        raise BadInput(f"data.min_count = {min_count}: no token occurs that often in the training set; lower it")
    arrays: list[np.ndarray] = []
    for part, sentences in (("train", train), ("test", test)):
        samples = np.full((len(sentences), length), PADDING, dtype=np.int32)
        for row, words in zip(samples, tokens[part], strict=True):
            ids = [vocabulary.get(word, UNKNOWN) for word in words[:length]]
            row[: len(ids)] = ids
        arrays += [samples, np.array([label for _, label in sentences], dtype=np.int64)]
    return ArraySource(DataSpec((length,), classes, vocabulary=len(vocabulary) + 2), *arrays)
