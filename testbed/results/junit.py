# SPDX-License-Identifier: Apache-2.0
"""JUnit XML, for what shows test results in a browser.

FAIL is a ``failure``, SKIP is ``skipped``, LOST and ERROR are ``error`` with the word as the type.
Evidence, details and the console's tail are the text inside. Characters that XML 1.0 has no place
for (a guest's console is full of them) are shown as ``\\xNN``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from testbed.results.record import RunRecord, write_atomically
from testbed.results.verdicts import Outcome, Verdict, count

FILE_NAME = "junit.xml"

# XML 1.0, section 2.2: everything that is not a Char.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_NUMBERS = ("tests", "failures", "errors", "skipped", "time")
_ELEMENTS = {
    Verdict.FAIL: "failure",
    Verdict.SKIP: "skipped",
    Verdict.LOST: "error",
    Verdict.ERROR: "error",
}


def write_junit(record: RunRecord, path: Path) -> None:
    """Write the run as one test suite, whole or not at all (OSError)."""
    write_atomically(path, to_junit(record))


def to_junit(record: RunRecord) -> bytes:
    """The XML document, UTF-8 with its declaration."""
    suite = suite_element(
        "testbed",
        record.outcomes,
        started=record.started,
        duration_s=record.duration_s,
        properties={name: str(value) for name, value in sorted(record.versions.items())},
    )
    numbers = {name: suite.attrib[name] for name in _NUMBERS}
    root = ElementTree.Element("testsuites", numbers)
    root.append(suite)
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def suite_element(
    name: str,
    outcomes: Sequence[Outcome],
    *,
    started: str,
    duration_s: float,
    properties: Mapping[str, str],
) -> ElementTree.Element:
    """One ``testsuite`` with these tests in it; ``properties`` in their order."""
    counts = count(outcomes)
    numbers = {
        "tests": str(len(outcomes)),
        "failures": str(counts[Verdict.FAIL]),
        "errors": str(counts[Verdict.LOST] + counts[Verdict.ERROR]),
        "skipped": str(counts[Verdict.SKIP]),
        "time": f"{duration_s:.3f}",
    }
    suite = ElementTree.Element(
        "testsuite", {"name": _clean(name), "timestamp": started, **numbers}
    )
    parent = ElementTree.SubElement(suite, "properties")
    for each, value in properties.items():
        _property(parent, each, value)
    for outcome in outcomes:
        _test_case(suite, outcome)
    return suite


def _test_case(suite: ElementTree.Element, outcome: Outcome) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        {
            "classname": ".".join(outcome.requirements) or "testbed",
            "name": _clean(outcome.test),
            "time": f"{outcome.duration_s:.3f}",
        },
    )
    text = "\n".join([*map(str, outcome.evidence), outcome.details, outcome.console_tail]).strip()
    element = _ELEMENTS.get(outcome.verdict)
    if element is None:
        if text:
            ElementTree.SubElement(case, "system-out").text = _clean(text)
        return
    end = ElementTree.SubElement(
        case, element, {"type": str(outcome.verdict), "message": _clean(outcome.reason)}
    )
    end.text = _clean(text) or None


def _property(parent: ElementTree.Element, name: str, value: str) -> None:
    ElementTree.SubElement(parent, "property", {"name": _clean(name), "value": _clean(value)})


def _clean(text: str) -> str:
    return _NOT_XML.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
