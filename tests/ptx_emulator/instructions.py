"""Every opcode and what binds it."""

from __future__ import annotations

from . import arithmetic, asynchronous, matrix, moves, warp

HANDLERS = arithmetic.HANDLERS | warp.HANDLERS | moves.HANDLERS | asynchronous.HANDLERS | matrix.HANDLERS
