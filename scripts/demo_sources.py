"""The texts behind the demo's rows: verses, words, functions and passages, read from where they lie.

Three public-domain Bibles and WordNet come from Debian packages, functions and documentation from Python's standard
library. What becomes of them, and who may see which, is `demo_data.py`'s business.
"""

from __future__ import annotations

import ast
import html
import json
import re
import shutil
import subprocess
import sysconfig
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

SOURCES = Path.home() / ".cache" / "llm-merge" / "demo-sources"
DEBIAN_PACKAGES = ("sword-text-kjv", "sword-text-web", "sword-text-sparv", "wordnet-base")


# Words of the King James Version that modern English has lost. A verse is a row where the King James text has one and
# the modern text has none, so that every row shows the style.
ARCHAIC = re.compile(
    r"\b(?:unto|thee|thou|thy|thine|ye|hath|hast|doth|dost|shalt|wilt|saith|spake|wherefore|thereof|whosoever|"
    r"begat|brethren|nigh|verily|[a-z]{2,}eth)\b",
    re.IGNORECASE,
)
NOT_ARCHAIC = re.compile(r"\b(?:teeth|beneath|elizabeth|nazareth|japheth|bethlehem|[A-Z][a-z]*eth)\b")


def is_king_james(text: str) -> bool:
    """Whether a text has a word of `ARCHAIC` in it."""
    return ARCHAIC.search(NOT_ARCHAIC.sub("", text)) is not None


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


def fetch_sources() -> None:
    """Unpacks the Debian packages into `SOURCES` (nothing is installed, and root is not needed)."""
    if all((SOURCES / "unpacked" / package).is_file() for package in DEBIAN_PACKAGES):
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise SystemExit(
            f"The texts come from the Debian packages {', '.join(DEBIAN_PACKAGES)}, and this machine has no apt-get "
            "and dpkg. Unpack them elsewhere (apt-get download …; dpkg -x …) and give the folder with --sources. "
            "The finished rows are in assets/demo/examples already."
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
