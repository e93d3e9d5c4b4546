"""Conversations as text on the device: the same function that training used. Needs nothing but the standard library."""

from __future__ import annotations

from edgepeft.chat import render

__all__ = ["render"]
