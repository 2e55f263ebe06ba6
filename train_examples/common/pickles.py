"""Read the values in a pickle without importing or calling anything that the pickle names."""

import pickletools
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class Name(str):
    """The dotted name of a function or class."""


@dataclass(eq=False, repr=False)
class Call:
    """A call that a pickle asks for: it is recorded, and never made.

    Attributes:
      function: the name of the function or class to call.
      args: its arguments.
      state: the state that the pickle then gives to the result.
    """

    function: Name
    args: tuple[Any, ...]
    state: Any = None


class NotAllowed(ValueError):
    """The pickle names a function or class that is not allowed; `args` has its name."""


class _Mark:
    """A mark on the stack, where the items of a tuple, list or dict begin."""


def read_pickle(data: bytes, allowed: Collection[str], most_opcodes: int) -> Any:
    """Return the value of a pickle of protocol 2 to 5, with a `Call` wherever it makes an object.

    Memory is bounded by the length of `data` and by `most_opcodes`: each opcode makes one small
    value, or copies bytes that are in `data`. Byte strings, Python 2's strings and text are all
    returned as `bytes`.

    Args:
      data: the pickle.
      allowed: the names, such as "numpy.dtype", that the pickle may call.
      most_opcodes: the largest number of opcodes that such a pickle needs.

    Raises:
      NotAllowed: the pickle names a function or class that is not in `allowed`.
      ValueError: the pickle is damaged, or needs more than this function supports.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    with warnings.catch_warnings():
        # The parser warns of bad escapes in an opcode that `_execute` refuses.
        warnings.simplefilter("ignore")
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count == most_opcodes:
                raise ValueError(f"it has more than {most_opcodes} opcodes")
            _execute(opcode.name, argument, stack, memo)
            if opcode.name in ("GLOBAL", "STACK_GLOBAL") and stack[-1] not in allowed:
                raise NotAllowed(stack[-1])
    return _pop(stack, object)


def _execute(opcode: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    match opcode:
        case "PROTO" | "FRAME" | "STOP":
            pass
        case "MARK":
            stack.append(_Mark())
        case "NONE":
            stack.append(None)
        case "NEWTRUE" | "NEWFALSE":
            stack.append(opcode == "NEWTRUE")
        case "BININT" | "BININT1" | "BININT2" | "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
            stack.append(argument)
        case "BYTEARRAY8":
            stack.append(bytes(argument))
        case "SHORT_BINSTRING" | "BINSTRING":
            stack.append(argument.encode("latin-1"))
        case "SHORT_BINUNICODE" | "BINUNICODE":
            stack.append(argument.encode("utf-8", "surrogatepass"))
        case "EMPTY_TUPLE":
            stack.append(())
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            items = [_pop(stack, object) for _ in range(int(opcode[-1]))]
            stack.append(tuple(reversed(items)))
        case "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        case "EMPTY_LIST":
            stack.append([])
        case "APPEND":
            item = _pop(stack, object)
            _top(stack, list).append(item)
        case "APPENDS":
            items = _pop_to_mark(stack)
            _top(stack, list).extend(items)
        case "EMPTY_DICT":
            stack.append({})
        case "SETITEM":
            value, key = _pop(stack, object), _pop(stack, bytes)
            _top(stack, dict)[key] = value
        case "SETITEMS":
            items = _pop_to_mark(stack)
            keys, values = items[::2], items[1::2]
            if len(keys) != len(values) or not all(isinstance(key, bytes) for key in keys):
                raise ValueError("the keys of a dict must be strings, with a value each")
            _top(stack, dict).update(zip(keys, values, strict=True))
        case "BINPUT" | "LONG_BINPUT":
            memo[argument] = _top(stack, object)
        case "MEMOIZE":
            memo[len(memo)] = _top(stack, object)
        case "BINGET" | "LONG_BINGET":
            if argument not in memo:
                raise ValueError(f"it refers to a value {argument} that it never stored")
            stack.append(memo[argument])
        case "GLOBAL":
            stack.append(Name(argument.replace(" ", ".")))
        case "STACK_GLOBAL":
            name, module = _pop(stack, bytes), _pop(stack, bytes)
            stack.append(Name(f"{module.decode()}.{name.decode()}"))
        case "REDUCE":
            args, function = _pop(stack, tuple), _pop(stack, Name)
            stack.append(Call(function, args))
        case "BUILD":
            state = _pop(stack, object)
            _top(stack, Call).state = state
        case _:
            raise ValueError(f"the opcode {opcode} is not supported")


def _top(stack: list[Any], kind: type[T]) -> T:
    if not stack:
        raise ValueError("it takes a value from an empty stack")
    if not isinstance(stack[-1], kind):
        raise ValueError(f"it needs {kind.__name__}, it has {type(stack[-1]).__name__}")
    return stack[-1]


def _pop(stack: list[Any], kind: type[T]) -> T:
    value = _top(stack, kind)
    stack.pop()
    return value


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    for start in range(len(stack) - 1, -1, -1):
        if isinstance(stack[start], _Mark):
            items = stack[start + 1 :]
            del stack[start:]
            return items
    raise ValueError("it ends a collection that it never began")
