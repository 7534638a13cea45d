"""Makes the demo's example rows and the rows its specialists are trained on, the same ones every time.

Sources: three public-domain Bibles and WordNet from Debian packages, the functions and documentation of Python's
standard library, and the questions in `demo_questions.tsv`. A verse, word, function or paragraph belongs to one part
(train, work or heldout) by the hash of its name, so that no part sees another's, in any language or task. It knows
nothing about models.

    python scripts/demo_data.py            writes assets/demo/examples (needs apt-get and dpkg, or --sources)
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import html
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "assets" / "demo" / "examples"
SOURCES = Path.home() / ".cache" / "llm-merge" / "demo-sources"
DEBIAN_PACKAGES = ("sword-text-kjv", "sword-text-web", "sword-text-sparv", "wordnet-base")
SEED = 20
WORK = 32
HELDOUT = {"decoder": 200, "encoder": 500}
SHARES = {"heldout": 0.12, "work": 0.03}
"""How much of each source is set aside; far more than is used of verses and words."""
FEW_SHARES = {"heldout": 0.4, "work": 0.1}
"""The same for functions, paragraphs and questions, of which there are fewer."""

Row = dict[str, Any]

# Words of the King James Version that modern English has lost. A verse is a row where the King James text has one and
# the modern text has none, so that every row shows the style.
ARCHAIC = re.compile(
    r"\b(?:unto|thee|thou|thy|thine|ye|hath|hast|doth|dost|shalt|wilt|saith|spake|wherefore|thereof|whosoever|"
    r"begat|brethren|nigh|verily|[a-z]{2,}eth)\b",
    re.IGNORECASE,
)
NOT_ARCHAIC = re.compile(r"\b(?:teeth|beneath|elizabeth|nazareth|japheth|bethlehem|[A-Z][a-z]*eth)\b")


def part_of(name: str, shares: dict[str, float]) -> str:
    """train, work or heldout: by the hash of the name, so that it never depends on what else there is."""
    place = int.from_bytes(hashlib.sha256(f"{SEED}:{name}".encode()).digest()[:8], "big") / 2**64
    if place < shares["heldout"]:
        return "heldout"
    return "work" if place < shares["heldout"] + shares["work"] else "train"


# --- Verses ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verse:
    name: str
    king_james: str
    modern: str
    spanish: str


def plain(osis: str) -> str:
    """A verse without its notes, titles and tags."""
    text = re.sub(r"<(note|title)\b[^>]*?(?:/>|>.*?</\1>)", " ", osis, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub(r"[“”¶]", " ", text).replace("’", "'").replace("‘", "'")
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    return re.sub(r"\s+", " ", text).strip(" '")


@cache
def verses() -> tuple[Verse, ...]:
    """The verses that all three Bibles have, of a length that fits a demo; a text that comes twice comes once here."""
    kept = SOURCES / "verses.json"
    if kept.is_file():
        return tuple(Verse(*fields) for fields in json.loads(kept.read_text(encoding="utf-8")))
    from pysword.modules import SwordModules

    modules = SwordModules(str(SOURCES / "usr" / "share" / "sword"))
    modules.parse_modules()
    king_james, modern, spanish = (
        modules.get_bible_from_module(name) for name in ("engKJV2006eb", "engWEB2015eb", "spaRV1909eb")
    )
    found, seen = [], set()
    for books in king_james.get_structure().get_books().values():
        for book in books:
            for chapter, length in enumerate(book.chapter_lengths, start=1):
                for number in range(1, length + 1):
                    if book.name == "Psalms" and number == 1:
                        continue  # the Spanish text begins with the psalm's title there, without a tag
                    place = {"books": [book.name.lower()], "chapters": [chapter], "verses": [number]}
                    try:
                        texts = [plain(b.get(**place, clean=False)) for b in (king_james, modern, spanish)]
                    except ValueError:  # numbered differently in one of them
                        continue
                    if all(30 <= len(t) <= 180 for t in texts) and not seen.intersection(texts):
                        seen.update(texts)
                        found.append(Verse(f"{book.name} {chapter}:{number}", *texts))
    kept.write_text(json.dumps([astuple(verse) for verse in found]), encoding="utf-8")  # reading them takes a minute
    return tuple(found)


def shows_the_style(verse: Verse) -> bool:
    """Whether the two English texts say the same in clearly different words."""
    old, new = (re.findall(r"[a-z']+", text.lower()) for text in (verse.king_james, verse.modern))
    same = SequenceMatcher(None, old, new, autojunk=False).ratio()
    return 0.35 <= same <= 0.8 and is_king_james(verse.king_james) and not is_king_james(verse.modern)


def is_king_james(text: str) -> bool:
    """Whether a text has a word of `ARCHAIC` in it."""
    return ARCHAIC.search(NOT_ARCHAIC.sub("", text)) is not None


def decoder_verses(part: str) -> list[Row]:
    return [
        {"input": f"Rewrite this verse in King James English: {v.modern}", "output": v.king_james}
        for v in verses()
        if part_of(v.name, SHARES) == part and shows_the_style(v)
    ]


def encoder_verses(part: str) -> list[Row]:
    """Spanish verse → modern English verse; the negative is another verse of the same part."""
    chosen = [v for v in verses() if part_of(v.name, SHARES) == part]
    return with_negatives([(v.spanish, v.modern) for v in chosen])


# --- Words ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    name: str
    kind: str
    meaning: str
    example: str


@cache
def words() -> tuple[Word, ...]:
    """Words of one part of speech that occur in WordNet's tagged texts, each with its most frequent sense."""
    folder = SOURCES / "usr" / "share" / "wordnet"
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    entries: dict[str, list[tuple[str, str, int]]] = {}
    glosses = {}
    for kind in kinds:
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                glosses[kind, line.split(" ", 1)[0]] = line.split(" | ", 1)[1].strip()
        for line in (folder / f"index.{kind}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                senses = int(fields[2])
                entries.setdefault(fields[0], []).append((kind, fields[-senses], int(fields[-senses - 1])))
    found, seen = [], set()
    for name, places in sorted(entries.items()):
        kind, offset, tagged = places[0]
        if len(places) > 1 or tagged == 0 or not re.fullmatch(r"[a-z]{4,}", name):
            continue
        meaning, _, rest = glosses[kind, offset].partition('"')
        meaning = re.sub(r"^\([^)]*\)\s*", "", meaning).strip(" ;:")
        example = rest.partition('"')[0].strip()
        # Synonyms share a meaning: only the first is a row, else one part would hold another's answer.
        if 20 <= len(meaning) <= 110 and meaning not in seen and name not in meaning:
            seen.add(meaning)
            found.append(Word(name, kinds[kind], meaning, example))
    return tuple(found)


def decoder_words(part: str) -> list[Row]:
    return [
        {"input": f"Define the word: {w.name}", "output": f"({w.kind}) {w.meaning}"}
        for w in words()
        if part_of(w.name, SHARES) == part
    ]


def encoder_words(part: str) -> list[Row]:
    """Definition → word; the negative is another word of the same part."""
    return with_negatives([(w.meaning, w.name) for w in words() if part_of(w.name, SHARES) == part])


# --- General: what the base must not lose ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    name: str
    summary: str
    code: str


@cache
def functions() -> tuple[Function, ...]:
    """Short functions of Python's standard library with the first sentence of their docstring."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "turtledemo"}
    found, seen = [], set()
    for path in sorted(library.rglob("*.py")):
        if skipped.intersection(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
                continue
            summary = " ".join(re.split(r"\n\s*\n", docstring)[0].split())
            if len(node.body) < 2 or not 25 <= len(summary) <= 140 or node.name.startswith("__"):
                continue
            node.body = node.body[1:]
            node.decorator_list = []
            code = ast.unparse(node)
            if 60 <= len(code) <= 420 and code not in seen and summary not in seen:
                seen |= {code, summary}
                found.append(Function(f"{path.stem}.{node.name}", summary, code))
    return tuple(found)


@cache
def passages() -> tuple[tuple[str, str], ...]:
    """Two sentences or more of the Python language reference: (the beginning, what follows)."""
    from pydoc_data.topics import topics

    found, seen = [], set()
    for _, text in sorted(topics.items()):
        for block in re.split(r"\n\s*\n", text):
            if block.startswith((" ", "*", "-", "+", "|")) or "::" in block or "=" in block:
                continue  # grammar, tables and examples
            sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"[*`]|\(see [^)]*\)", "", " ".join(block.split())))
            first, rest = sentences[0], " ".join(sentences[1:])
            if 50 <= len(first) <= 220 and 50 <= len(rest) <= 260 and not seen & {first, rest}:
                seen |= {first, rest}
                found.append((first, rest))
    return tuple(found)


def questions(part: str) -> list[Row]:
    """Questions and answers written for this project: the first 50 lines are for training, the last 50 held out."""
    lines = (Path(__file__).parent / "demo_questions.tsv").read_text(encoding="utf-8").splitlines()
    chosen = {"train": lines[:50], "heldout": lines[50:100], "work": lines[100:]}[part]
    return [dict(zip(("input", "output"), line.split("\t"), strict=True)) for line in chosen]


def decoder_general(part: str) -> dict[str, list[Row]]:
    """The four kinds of general rows, each by itself: how many of each are used is `MIXTURE`."""
    return {
        "documentation": [
            {"input": f"Continue this text: {first}", "output": rest}
            for first, rest in passages() if part_of(first, FEW_SHARES) == part
        ],
        "sentence": [
            {"input": f"Write a sentence with these words: {w.name}, {hint(w)}", "output": w.example}
            for w in words() if part_of(w.name, SHARES) == part and 25 <= len(w.example) <= 120
        ],
        "python": [
            {"input": f"Write a Python function {f.name.split('.')[1]}: {f.summary}", "output": f.code}
            for f in functions() if part_of(f.code, FEW_SHARES) == part
        ],
        "question": questions(part),
    }  # fmt: skip


def hint(word: Word) -> str:
    """The longest other word of the example, so that the sentence can be guessed at all."""
    others = [w for w in re.findall(r"[a-z]+", word.example.lower()) if not w.startswith(word.name[:4])]
    return max(others, key=len, default="the")


MIXTURE = {
    "work": {"documentation": 10, "sentence": 6, "python": 8, "question": 8},
    "heldout": {"documentation": 60, "sentence": 40, "python": 50, "question": 50},
}


def encoder_general(part: str) -> list[Row]:
    """What the base was made for: docstring → function (seven in eight), a sentence → the text that follows it."""
    code = [(f.summary, f.code) for f in functions() if part_of(f.code, FEW_SHARES) == part]
    text = [(first, rest) for first, rest in passages() if part_of(first, FEW_SHARES) == part]
    size = WORK if part == "work" else HELDOUT["encoder"]
    return with_negatives(sample(code, size - size // 8, part) + sample(text, size // 8, part))


# --- Rows -----------------------------------------------------------------------------------------------------------


def with_negatives(pairs: list[tuple[str, str]]) -> list[Row]:
    """One negative for each row, from elsewhere in the same list; seeded."""
    others = [answer for _, answer in pairs]
    random.Random(SEED).shuffle(others)
    return [
        {"query": query, "pos": [answer], "neg": [next(o for o in (others[i], others[i - 1]) if o != answer)]}
        for i, (query, answer) in enumerate(pairs)
    ]


def sample(rows: list[Any], size: int, name: str) -> list[Any]:
    """`size` rows in a seeded order; an error when there are fewer."""
    if len(rows) < size:
        raise SystemExit(f"Only {len(rows)} rows for {name}, {size} are wanted.")
    return random.Random(f"{SEED}:{name}").sample(rows, size)


def example_sets() -> Iterator[tuple[str, list[Row]]]:
    """Every committed example set: (file name, rows)."""
    for part in ("work", "heldout"):
        for kind, tasks in {
            "decoder": {"verse": decoder_verses, "dictionary": decoder_words},
            "encoder": {"verse": encoder_verses, "dictionary": encoder_words},
        }.items():
            size = WORK if part == "work" else HELDOUT[kind]
            for task, rows in tasks.items():
                chosen = sample(rows(part), size, f"{kind}/{task}.{part}")
                if kind == "encoder":  # negatives from the same set: each query competes with its passages alone
                    chosen = with_negatives([(row["query"], row["pos"][0]) for row in chosen])
                yield f"{kind}/{task}.{part}.jsonl", chosen
        mixed = [
            row
            for kind, rows in decoder_general(part).items()
            for row in sample(rows, MIXTURE[part][kind], f"general/{kind}.{part}")
        ]
        yield f"decoder/general.{part}.jsonl", sample(mixed, len(mixed), "general")
        rows = encoder_general(part)
        yield f"encoder/general.{part}.jsonl", sample(rows, len(rows), "general")


def training_rows(model_type: str, task: str) -> list[Row]:
    """All rows that a specialist may learn from, in a seeded order; `general` is for replay."""
    if (model_type, task) == ("decoder", "general"):
        # Kinds in turn, so that any beginning of the list holds all four.
        kinds = [sample(rows, len(rows), kind) for kind, rows in decoder_general("train").items()]
        return [kind[i % len(kind)] for i in range(2 * len(kinds[0])) for kind in kinds]
    if (model_type, task) == ("encoder", "general"):
        pairs = [(f.summary, f.code) for f in functions() if part_of(f.code, FEW_SHARES) == "train"]
        pairs += [p for p in passages() if part_of(p[0], FEW_SHARES) == "train"]
        rows = with_negatives(pairs)
    else:
        makers = {
            "decoder": {"verse": decoder_verses, "dictionary": decoder_words},
            "encoder": {"verse": encoder_verses, "dictionary": encoder_words},
        }
        rows = makers[model_type][task]("train")
    return sample(rows, len(rows), f"{model_type}/{task}.train")


def as_lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- Fetching -------------------------------------------------------------------------------------------------------


def fetch_sources() -> None:
    """Unpacks the Debian packages into `SOURCES` (nothing is installed, and root is not needed)."""
    if all((SOURCES / "unpacked" / package).is_file() for package in DEBIAN_PACKAGES):
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise SystemExit(
            f"The texts come from the Debian packages {', '.join(DEBIAN_PACKAGES)}, and this machine has no apt-get "
            f"and dpkg. Unpack them elsewhere (apt-get download …; dpkg -x …) and give the folder with --sources. "
            f"The finished rows are in {EXAMPLES.relative_to(ROOT)} already."
        )
    downloads = SOURCES / "packages"
    (SOURCES / "unpacked").mkdir(parents=True, exist_ok=True)
    downloads.mkdir(exist_ok=True)
    for package in DEBIAN_PACKAGES:
        try:
            subprocess.run(["apt-get", "download", package], cwd=downloads, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"apt-get cannot download {package} (try apt-get update first):\n{error.stderr}") from None
        (file,) = downloads.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", str(file), str(SOURCES)], check=True)
        (SOURCES / "unpacked" / package).write_text(file.name)


def main() -> None:
    global SOURCES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, help="a folder with the Debian packages already unpacked into it")
    options = parser.parse_args()
    if options.sources:
        SOURCES = options.sources
    else:
        fetch_sources()
    for name, rows in example_sets():
        path = EXAMPLES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_lines(rows).encode())
        print(f"{name}: {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
