"""Passwords: long ones are welcome, guessable ones are not, and nothing tells who exists."""

import asyncio
import re
import statistics
import time

import pytest

from mcp_control.kernel.errors import Invalid, Overloaded
from mcp_control.security.passwords import Passwords, check_strength, one_time_password
from tests.security.world import GOOD


@pytest.mark.parametrize(
    "password",
    [
        GOOD,
        "🦊🌲🎈🚀🍋" * 40,
        "🦊" * 200,
        "пароль из слов длинный",
        "a" * 7 + "kfuxwhbm qz",
        "Zażółć gęślą jaźń",
        " leading and trailing ",
        "k" * 1000 + "fuxwhbmqz",
        "administratively quirky otters",
    ],
)
def test_any_composition_is_accepted(password: str) -> None:
    """Length counts; letters, scripts, spaces and emoji are the owner's choice."""
    check_strength(password, "admin")


@pytest.mark.parametrize(
    "password",
    [
        "",
        "fourteen chars",
        "a" * 15,
        "abababababababab",
        "x7#" * 10,
        "vwxyz#" * 4,
        "administrator12345",
        "adminadminadminadmin",
        "mcp-control-panel",
        "passwordpassword1",
        "123456789012345678",
        "abcdefghijklmnopqrst",
        "qwertyuiopasdfghjkl",
        "jane.doe@example1234",
        "k" * 1020 + "fuxwhbmqz",
        "é" * 14,
        "e\u0301" * 14,  # 14 characters, each in two parts
    ],
)
def test_short_long_and_guessable_ones_are_refused_with_a_reason(password: str) -> None:
    """What attackers try first is refused, without repeating the password."""
    with pytest.raises(Invalid) as caught:
        check_strength(password, "jane.doe@example")
    assert [error.code for error in caught.value.errors] == ["weak-password"]
    assert not password or password not in caught.value.detail


async def test_only_the_right_password_is_right() -> None:
    """The stored form is salted argon2id; it matches its password, in either Unicode form, and nothing else."""
    passwords = Passwords(memory_kib=64)
    stored = await passwords.hash("Zażółć gęślą jaźń")
    assert stored.startswith("$argon2id$v=19$m=64,t=1,p=1$")
    assert stored != await passwords.hash("Zażółć gęślą jaźń")
    assert await passwords.verify(stored, "Zażółć gęślą jaźń")
    for wrong in ("zażółć gęślą jaźń", "Zażółć gęślą jaź", "Zażółć gęślą jaźń ", "", "\ud800"):
        assert not await passwords.verify(stored, wrong)
    assert not await passwords.verify("not a hash", "x")


def test_default_cost_is_the_standards() -> None:
    """argon2id with 46 MiB, one pass, one lane (ASVS 5.0, appendix C)."""
    passwords = Passwords()
    stored = asyncio.run(passwords.hash(GOOD))
    assert stored.startswith("$argon2id$v=19$m=47104,t=1,p=1$")


async def test_unknown_user_takes_as_long_as_a_wrong_password() -> None:
    """The time of a refusal does not tell whether the account exists."""
    passwords = Passwords()
    stored = await passwords.hash(GOOD)

    async def spent(of: str | None) -> float:
        start = time.perf_counter()
        assert not await passwords.verify(of, "wrong password anyway")
        return time.perf_counter() - start

    known, unknown = [], []
    for _ in range(7):
        known.append(await spent(stored))
        unknown.append(await spent(None))
    assert 0.5 < statistics.median(unknown) / statistics.median(known) < 2
    assert not await passwords.verify(None, "")


async def test_flood_of_logins_is_shed() -> None:
    """Only so many wait for a hash; the rest are told to come back, and the loop stays free."""
    passwords = Passwords(memory_kib=8192, waiting=3)
    outcomes = await asyncio.gather(*[passwords.hash(GOOD) for _ in range(10)], return_exceptions=True)
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 6
    assert sum(isinstance(outcome, str) for outcome in outcomes) == 4
    assert isinstance(await passwords.hash(GOOD), str)


def test_one_time_password_is_random_and_accepted() -> None:
    """It can be typed, is never twice the same and meets the rules."""
    made = {one_time_password() for _ in range(100)}
    assert len(made) == 100
    for password in made:
        assert re.fullmatch(r"[a-z2-7]{5}(-[a-z2-7]{5}){3}", password)
        check_strength(password, "admin")
