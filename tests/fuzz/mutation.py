"""Mutation: protobuf messages that are nearly right, made from right ones by a seeded generator."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

_VARINT, _FIXED64, _BYTES, _GROUP_START, _GROUP_END, _FIXED32 = range(6)
_NUMBERS = (0, 1, 2, 127, 128, 255, 4096, 16384, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63)
_NUMBERS = (*_NUMBERS, (1 << 64) - 1, (1 << 64) - 2)  # the last two are -1 and -2
_DOUBLES = (0.0, -0.0, 0.05, 0.1, -1.0, 1e300, 5e-324, float("inf"), float("-inf"), float("nan"))
_STRINGS = (
    b"",
    b"\xff\xfe",
    b"\xc0\x80",
    b"\xed\xa0\x80",  # a surrogate
    b"\xf4\x90\x80\x80",  # above the last code point
    b"\xe2\x82",  # cut short
    b"\x00",
    "\U0001f600\u202e\ufeff".encode(),
    b"%s%n{0}${jndi}",
    b"x" * 300,
    b" \n\t\r\x0b",
)


@dataclass(slots=True)
class _Field:
    """One field on the wire: its number, wire type, and value.

    The value is an integer for numbers, bytes for texts and packed fields, a list of fields for sub-messages.
    """

    number: int
    kind: int
    value: Any


def mutated(message: Message, draw: random.Random) -> bytes:
    """A message with one to four faults, as bytes."""
    fields = _decode(message.SerializeToString(), message.DESCRIPTOR)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        draw.choice(_CHANGES)(fields, draw)
    data = _encode(fields)
    for _ in range(draw.choice((0, 0, 1, 1, 2))):
        data = draw.choice(_DAMAGES)(data, draw)
    return data


def varint(number: int) -> bytes:
    """A number of any size as a varint."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _decode(data: bytes, descriptor: Any) -> list[_Field]:
    """The fields of a right message."""
    fields, position = [], 0

    def number() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        tag = number()
        kind = tag & 7
        value: Any
        if kind == _VARINT:
            value = number()
        elif kind == _BYTES:
            size = number()
            value = data[position : position + size]
            position += size
            inside = descriptor.fields_by_number[tag >> 3].message_type
            if inside is not None:
                value = _decode(value, inside)
        else:
            size = 8 if kind == _FIXED64 else 4
            value = int.from_bytes(data[position : position + size], "little")
            position += size
        fields.append(_Field(tag >> 3, kind, value))
    return fields


def _encode(fields: list[_Field]) -> bytes:
    out = []
    for one in fields:
        out.append(varint(one.number << 3 | one.kind))
        value = one.value
        if isinstance(value, list):
            value = _encode(value)
        if one.kind == _VARINT:
            out.append(varint(value if isinstance(value, int) else len(value)))
        elif one.kind == _BYTES:
            value = value if isinstance(value, bytes) else varint(value)
            out += [varint(len(value)), value]
        elif one.kind in (_FIXED64, _FIXED32):
            size = 8 if one.kind == _FIXED64 else 4
            value = value.to_bytes(16, "little") if isinstance(value, int) else value
            out.append(value[:size].ljust(size, b"\0"))
        elif isinstance(value, bytes):
            out.append(value)
    return b"".join(out)


def _pick(fields: list[_Field], draw: random.Random) -> tuple[list[_Field], int] | None:
    """A random field of the message or of a sub-message: the list that has it, and its place."""
    places = []
    lists = [fields]
    while lists:
        one = lists.pop()
        places += [(one, place) for place in range(len(one))]
        lists += [field.value for field in one if isinstance(field.value, list)]
    return draw.choice(places) if places else None


def _change(
    change: Callable[[list[_Field], int, random.Random], None],
) -> Callable[[list[_Field], random.Random], None]:
    def apply(fields: list[_Field], draw: random.Random) -> None:
        place = _pick(fields, draw)
        if place is not None:
            change(*place, draw)

    return apply


def _drop(fields: list[_Field], place: int, draw: random.Random) -> None:
    del fields[place]


def _duplicate(fields: list[_Field], place: int, draw: random.Random) -> None:
    fields[place:place] = [fields[place]] * draw.choice((1, 1, 2, 9, 30))


def _shuffle(fields: list[_Field], place: int, draw: random.Random) -> None:
    draw.shuffle(fields)


def _renumber(fields: list[_Field], place: int, draw: random.Random) -> None:
    one = fields[place]
    fields[place] = _Field(draw.choice((0, 1, 2, 3, 4, 5, 15, 16, 19000, (1 << 29) - 1, 1 << 29)), one.kind, one.value)


def _wrong_type(fields: list[_Field], place: int, draw: random.Random) -> None:
    one = fields[place]
    fields[place] = _Field(one.number, draw.randrange(8), one.value)


def _other_value(fields: list[_Field], place: int, draw: random.Random) -> None:
    one = fields[place]
    value: Any
    if one.kind == _FIXED64:
        value = int.from_bytes(struct.pack("<d", draw.choice(_DOUBLES)), "little")
    elif one.kind == _BYTES:
        value = draw.choice((*_STRINGS, draw.randbytes(draw.randrange(40)), b"".join(map(varint, _NUMBERS))))
    else:
        value = draw.choice(_NUMBERS)
    fields[place] = _Field(one.number, one.kind, value)


def _nest(fields: list[_Field], place: int, draw: random.Random) -> None:
    """Put a field into itself, again and again; protobuf allows 100 levels."""
    one = fields[place]
    depth = draw.choice((1, 3, 98, 99, 100, 101, 300))
    if draw.random() < 0.5:
        value = one.value if isinstance(one.value, bytes) else b""
        for _ in range(depth):
            value = varint(one.number << 3 | _BYTES) + varint(len(value)) + value
        fields[place] = _Field(one.number, _BYTES, value)
    else:
        ends = draw.choice((depth, depth - 1, 0))
        tags = varint(one.number << 3 | _GROUP_START) * depth + varint(one.number << 3 | _GROUP_END) * ends
        fields.insert(place, _Field(one.number, _GROUP_START, tags))


def _unknown(fields: list[_Field], place: int, draw: random.Random) -> None:
    number, kind = draw.choice((6, 99, 536870911)), draw.choice((_VARINT, _FIXED64, _BYTES, _FIXED32))
    fields.insert(place, _Field(number, kind, draw.choice(_NUMBERS)))


_CHANGES = tuple(
    map(_change, (_drop, _duplicate, _shuffle, _renumber, _wrong_type, _other_value, _other_value, _nest, _unknown))
)


def _flip(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8)) if out else 0):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    more = draw.choice((draw.randbytes(draw.randrange(1, 9)), b"\xff" * draw.choice((5, 9, 10, 11)), b"\x80" * 12))
    return data[:place] + more + data[place:]


def _cut(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + data[place + draw.randrange(1, 9) :]


def _splice(data: bytes, draw: random.Random) -> bytes:
    return data[draw.randrange(len(data) + 1) :] + data[: draw.randrange(len(data) + 1)]


def _random(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice((0, 1, 2, 7, 40, 500)))


_DAMAGES = (_flip, _flip, _flip, _truncate, _insert, _cut, _splice, _random)
