"""A method is replaced for one thread, and the object is left as it was."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastvlm.functional.overrides import override_method


class Greeter:
    def greet(self, name: str, mark: str = "!") -> str:
        return f"Hello {name}{mark}"


def shouted(original: Any, *args: Any, **kwargs: Any) -> str:
    return original(*args, **kwargs).upper()


def test_the_method_is_replaced_while_the_context_lasts() -> None:
    one, other = Greeter(), Greeter()
    with override_method(one, "greet", shouted):
        assert one.greet("you", mark="?") == "HELLO YOU?"
        assert other.greet("you") == "Hello you!"
        assert list(inspect.signature(one.greet).parameters) == ["name", "mark"]
    assert one.greet("you") == "Hello you!"
    assert vars(one) == {}


def test_an_attribute_of_the_object_is_put_back() -> None:
    one = Greeter()
    one.greet = own = lambda name: f"Own {name}"
    with override_method(one, "greet", shouted):
        assert one.greet("you") == "OWN YOU"
    assert vars(one) == {"greet": own}


def test_what_somebody_else_has_put_there_since_stays() -> None:
    one = Greeter()
    with override_method(one, "greet", shouted):
        one.greet = own = lambda name: f"Own {name}"
    assert vars(one) == {"greet": own}


def test_the_innermost_replacement_is_called() -> None:
    one = Greeter()
    with override_method(one, "greet", shouted):
        with override_method(one, "greet", lambda original, *args: original(*args)[::-1]):
            assert one.greet("you") == "!uoy olleH"
        assert one.greet("you") == "HELLO YOU!"
    assert vars(one) == {}


def test_an_error_restores_the_method() -> None:
    one = Greeter()

    def fails(*_: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError), override_method(one, "greet", fails):
        one.greet("you")
    assert vars(one) == {}


def test_other_threads_call_the_method_itself_or_their_own_replacement() -> None:
    one = Greeter()
    entered, left = threading.Barrier(3), threading.Barrier(3)

    def replaced(word: str) -> str:
        with override_method(one, "greet", lambda original, name: f"{word} {original(name)}"):
            entered.wait(timeout=30)
            found = one.greet(word)
            # Nobody leaves before all have asked; the last one restores the method.
            left.wait(timeout=30)
        return found

    def plain() -> str:
        entered.wait(timeout=30)
        found = one.greet("c")
        left.wait(timeout=30)
        return found

    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(replaced, "a"), pool.submit(replaced, "b"), pool.submit(plain)]
        found = [task.result(timeout=60) for task in tasks]
    assert found == ["a Hello a!", "b Hello b!", "Hello c!"]
    assert vars(one) == {}


def test_many_threads_that_come_and_go() -> None:
    one = Greeter()

    def work(number: int) -> bool:
        right = True
        for _ in range(300):
            with override_method(one, "greet", lambda original, name: original(name) + str(number)):
                right &= one.greet("you") == f"Hello you!{number}"
            right &= one.greet("you") == "Hello you!"
        return right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert vars(one) == {}
