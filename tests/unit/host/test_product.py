# SPDX-License-Identifier: Apache-2.0
"""Products appear whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from testbed.errors import SetupError
from testbed.host import product


def test_a_product_appears_when_it_is_finished(tmp_path: Path) -> None:
    final = tmp_path / "products" / "key"
    with product.building(final) as partial:
        (partial / "file").write_text("x")
        assert not final.exists()
    assert (final / "file").read_text() == "x"
    assert [path.name for path in final.parent.iterdir()] == ["key"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    final = tmp_path / "key"

    def build() -> None:
        with product.building(final) as partial:
            (partial / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    old = tmp_path / ".key.1234"
    (old / "closed").mkdir(parents=True)
    (old / "closed" / "file").write_text("")
    (old / "closed").chmod(0o500)
    with product.building(tmp_path / "key"):
        assert not old.exists()


def test_a_system_error_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="No such file"), product.building(tmp_path / "key"):
        (tmp_path / "no" / "where").write_text("")


def test_only_one_holds_the_lock(tmp_path: Path) -> None:
    waited = threading.Event()
    order = []

    def second() -> None:
        with product.exclusive(tmp_path / "lock", waited.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with product.exclusive(tmp_path / "lock", lambda: None):
        thread.start()
        assert waited.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_waiting_for_the_lock_has_an_end(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        product.exclusive(lock, lambda: None),
        pytest.raises(SetupError, match="has held"),
        product.exclusive(lock, lambda: None, timeout_s=0.2),
    ):
        pass


def test_half_written_json_is_no_json(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    assert product.read_json(file) is None
    product.write_json(file, {"a": [1]})
    assert product.read_json(file) == {"a": [1]}
    file.write_text('{"a": [1')
    assert product.read_json(file) is None
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
