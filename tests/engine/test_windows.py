import pytest

import tiny
from fakes import BOS, ScriptedModel
from fewfire.windows import cut_tokens, windows


def test_windows_do_not_overlap_and_leave_nothing_to_score_out():
    assert cut_tokens(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert cut_tokens(range(5), 3, bos=9) == [[9, 0, 1], [9, 2, 3], [9, 4]]
    assert cut_tokens([], 3, bos=9) == []


@pytest.mark.parametrize("bos", [False, True])
def test_text_in_windows(bos):
    model = ScriptedModel(add_bos_token=bos)
    ids = model.tokenizer.encode(tiny.PARAGRAPH)
    cut = windows(model.tokenizer, model.config, tiny.PARAGRAPH, 20, 50)
    assert [token for window in cut for token in window[bos:]] == ids[:50]
    assert all(window[0] == BOS for window in cut) == bos
    assert max(map(len, cut)) == 20


def test_what_cannot_be_cut():
    model = ScriptedModel()
    for text, size, limit, message in [
        ("a b c d", 1, None, "window"),
        ("a b c d", 2.0, None, "window"),
        ("a b c d", 9, 1, "limit"),
        ("", 9, None, "0 tokens"),
        ("a\udce9", 9, None, "Unicode"),
    ]:
        with pytest.raises(ValueError, match=message):
            windows(model.tokenizer, model.config, text, size, limit)
