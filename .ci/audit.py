"""Look up what is installed: known vulnerabilities, withdrawn releases, and releases younger than a week.

python .ci/audit.py                  # every package of this environment
python .ci/audit.py lightning torch  # these alone

Exit code 0: nothing was found. 1: something was. 3: nothing was, but the index did not answer all questions, so that
nobody knows. A line ``ID DATE REASON`` in audit-exceptions.txt lets a vulnerability pass until that date.

It decides before a release (CONTRIBUTING.md); .ci/run only prints what it finds: what is published about other people's
packages today is no fault of the commit under test, and tests need no network.
"""

import json
import re
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timedelta, timezone
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

INDEX = "https://pypi.org"
LEAST_AGE = timedelta(days=7)  # most malicious releases are found and taken back within days
EXCEPTIONS = Path(__file__).with_name("audit-exceptions.txt")
OWN = "dia-lightning"


def main(names: Sequence[str]) -> int:
    """Print a line for each finding and for each question without an answer, and return the exit code."""
    installed = {name: version(name) for name in names} if names else _installed()
    excepted = read_exceptions(EXCEPTIONS, date.today())
    with ThreadPoolExecutor(8) as pool:
        lines = list(pool.map(lambda item: list(audit(*item, excepted)), installed.items()))
    found = [line for of_package in lines for line, is_known in of_package if is_known]
    open_questions = [line for of_package in lines for line, is_known in of_package if not is_known]
    print("\n".join([*found, *open_questions]), end="\n" if found or open_questions else "")
    print(f"{len(installed)} packages: {len(found)} findings, {len(open_questions)} questions without an answer")
    return 1 if found else 3 if open_questions else 0


def audit(name: str, installed: str, excepted: Mapping[str, date]) -> Iterator[tuple[str, bool]]:
    """Yield what is wrong with a release as lines of text, each with whether it is a finding or an open question."""
    package = f"{name} {installed}"
    public = installed.partition("+")[0]  # 2.11.0+cpu is another build of 2.11.0
    try:
        files = _files_of(_answer(f"/simple/{_normal(name)}/"), name, public)
        if not files:
            yield f"{package}: the index does not have this release (taken back, or from elsewhere)", True
        for state in {str(file["yanked"]) for file in files if file.get("yanked")}:
            yield f"{package}: withdrawn by its authors: {state}", True
        uploads = [datetime.fromisoformat(file["upload-time"].replace("Z", "+00:00")) for file in files]
        age = datetime.now(timezone.utc) - max(uploads) if uploads else LEAST_AGE
        if age < LEAST_AGE:
            yield f"{package}: {age.days} days old, wait until it is {LEAST_AGE.days}", True
    except (OSError, ValueError, KeyError) as error:
        yield f"{package}: age unknown: {error}", False
    try:
        for entry in _answer(f"/pypi/{_normal(name)}/{public}/json")["vulnerabilities"]:
            ids = {entry["id"], *entry.get("aliases", [])}
            if not entry.get("withdrawn") and not ids & set(excepted):
                fixed = ", ".join(entry.get("fixed_in") or ["none"])
                yield f"{package}: {' '.join(sorted(ids))}, fixed in {fixed}: {entry.get('link')}", True
    except (OSError, ValueError, KeyError) as error:  # a 404, too, is no answer and not the answer "none"
        yield f"{package}: vulnerabilities unknown: {error}", False


def read_exceptions(path: Path, today: date) -> dict[str, date]:
    """Return the exceptions that hold today: identifier of a vulnerability -> last day.

    Raises:
        ValueError: if a line has no date or no reason.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"(\S+)\s+(\d{4}-\d\d-\d\d)\s+\S.*", line)
            if match is None:
                raise ValueError(
                    f"{path.name}: {line!r} is no exception. Write ID DATE REASON, the date as 2026-12-31."
                )
            found[match[1]] = date.fromisoformat(match[2])
    return {name: until for name, until in found.items() if today <= until}


def _installed() -> dict[str, str]:
    found = {each.metadata["Name"]: each.version for each in distributions()}
    return {name: found[name] for name in sorted(found, key=str.lower) if _normal(name) != OWN}


def _answer(path: str) -> dict[str, Any]:
    kinds = "application/vnd.pypi.simple.v1+json, application/json;q=0.5"
    request = urllib.request.Request(INDEX + path, headers={"Accept": kinds})
    with urllib.request.urlopen(request, timeout=20) as answer:
        content: dict[str, Any] = json.load(answer)
    return content


def _files_of(page: Mapping[str, Any], name: str, installed: str) -> list[dict[str, Any]]:
    """Return the files of one release from the list of all."""
    start = re.compile(rf"{_normal(name).replace('-', '[-_.]+')}-{re.escape(installed)}(-|\.tar|\.zip)", re.I)
    return [file for file in page["files"] if start.match(file["filename"])]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
