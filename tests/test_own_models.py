"""Names of one's own models in the page's pickers."""

from __future__ import annotations

import pytest

from biasdpo.ui.components import own_choices, pasted


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("phi-2", "phi-2"),
        ("  /models/my phi.gguf\n", "/models/my phi.gguf"),
        ('"/models/my phi.gguf"', "/models/my phi.gguf"),
        ("'/models/my phi.gguf' ", "/models/my phi.gguf"),
        ("file:///models/my%20phi.gguf", "/models/my phi.gguf"),
        ("", ""),
        (None, ""),
    ],
)
def test_what_was_pasted_is_read_as_a_name(typed, name):
    assert pasted(typed) == name


def test_a_path_is_shown_by_its_last_two_parts():
    names = ["/models/phi.gguf", "smollm2", "", "auto", "someone/model", "/models/phi.gguf"]
    assert own_choices(names) == [("phi.gguf · in models", "/models/phi.gguf"), ("someone/model", "someone/model")]
    twins = ["/a/models/phi.gguf", "/b/models/phi.gguf"]
    assert own_choices(twins) == [(name, name) for name in twins]
