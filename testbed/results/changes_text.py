# SPDX-License-Identifier: Apache-2.0
"""What changed between two runs, as text for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from testbed.results.changes import Changes, ValueChange
from testbed.results.ktap import one_line

_MOST = 60  # values in text; JSON has all


def lines(found: Changes) -> Iterator[str]:
    """Verdicts first, the worst of them first; then the environment; then figures."""
    if found.is_same:
        yield f"no verdict changed ({found.same} are the same)"
    else:
        yield f"{len(found.verdicts)} verdicts changed, {found.same} are the same"
        width = max(len(each.name) for each in found.verdicts)
        for each in found.verdicts:
            yield f"  {each.kind:<18} {each.name:<{width}}  {each.before} → {each.after}"
            reason = each.reason_after or each.reason_before
            if reason:
                yield f"  {'':<18} {one_line(reason)}"
    yield from _values("environment", found.environment)
    yield from _values("figures (times only if they doubled or halved)", found.figures)
    if found.cut:
        yield f"left out: {found.cut}"


def _values(title: str, values: Sequence[ValueChange]) -> Iterator[str]:
    if not values:
        return
    yield ""
    yield title
    for each in values[:_MOST]:
        yield f"  {one_line(each.name)}: {one_line(each.before)} → {one_line(each.after)}"
    if len(values) > _MOST:
        yield f"  and {len(values) - _MOST} more (--format json has them)"
