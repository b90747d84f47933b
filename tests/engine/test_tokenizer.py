import json
import random
import threading

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

import tiny
from fewfire.errors import CheckpointError
from fewfire.tokenizer import StreamDecoder, Tokenizer

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|im_end|>>", "<s>", "[MASK]", "[WORD]", "[EAT]"]
TEXT = tiny.PARAGRAPH + " Straße, naïve café; ελληνικά; 日本語; 1234567890 (a+b)*c <tag> [x] it's\t\n\n"
PIECES = ["Hello", " world", "\n", "\n\n", " ", "  ", "é", "日本", "😀", "👩\u200d🚀", "I'm 123", "\t"]
PIECES += ["<", "|", ">", "im_end|>", "<|im_", "word[WORD]", "<think>", "\ufffd", *SPECIALS]


def add_tokens(inner: tokenizers.Tokenizer) -> None:
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS[:4]])
    inner.add_special_tokens(
        [
            AddedToken("[MASK]", special=True, normalized=False, lstrip=True),
            AddedToken("[WORD]", special=True, normalized=False, single_word=True),
            AddedToken("[EAT]", special=True, normalized=False, lstrip=True, rstrip=True),
        ]
    )
    inner.add_tokens([AddedToken("<think>", special=False, normalized=False)])


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM have it."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return inner


def with_bytes(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same merges over characters, with a token for every byte to fall back to."""
    inner.train_from_iterator([TEXT.replace("日本語", "")], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    description = json.loads(inner.to_str())
    model = description["model"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    model.update(vocab={name: i for i, name in enumerate(names)}, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def llama2() -> tokenizers.Tokenizer:
    """As Llama 2 has it: a space before every stretch of text, bytes for unknown characters."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_bytes(inner)


def mistral() -> tokenizers.Tokenizer:
    """As newer conversions of Llama 2 and Mistral have it: a space before the first stretch only."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_bytes(inner)


def gemma() -> tokenizers.Tokenizer:
    """As Gemma has it: no space in front, bytes for unknown characters."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return with_bytes(inner)


def metaspace() -> tokenizers.Tokenizer:
    """The decoder that takes the space off by itself."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always")])
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return with_bytes(inner)


KINDS = {f.__name__: f for f in (byte_level, llama2, mistral, gemma, metaspace)}
JSON: dict[str, str] = {}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    """The contents of a tokenizer.json of each kind."""
    if request.param not in JSON:
        inner = KINDS[request.param]()
        add_tokens(inner)
        JSON[request.param] = inner.to_str()
    return JSON[request.param]


@pytest.fixture
def tokenizer(kind) -> Tokenizer:
    return Tokenizer.from_json(kind)


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randrange(1, 12))) for _ in range(n)]


def test_special_tokens_as_the_library_finds_them(kind, tokenizer):
    library = tokenizers.Tokenizer.from_str(kind)
    for text in [TEXT, *texts(1500)]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, parse_special=True) == expected, text


def test_plain_text_never_becomes_a_special_token(tokenizer):
    for text in texts(500):
        assert not any(tokenizer.is_special(i) for i in tokenizer.encode(text)), text
    assert tokenizer.token_to_id("<|im_end|>") in tokenizer.encode("<|im_end|>", parse_special=True)


def test_ordinary_text_comes_back(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.encode("Hi <|im_end|> there")) == "Hi <|im_end|> there"


def test_added_tokens_that_are_not_special_stay_text(tokenizer):
    ids = tokenizer.encode("a<think>b")
    assert tokenizer.token_to_id("<think>") in ids
    assert tokenizer.decode(ids).replace(" ", "") == "a<think>b"  # Llama 2's puts a space after it


def test_skipping_special_tokens(tokenizer):
    ids = tokenizer.encode("<s>Hi<|im_end|>", parse_special=True)
    assert tokenizer.decode(ids).strip() == "Hi"
    assert "<|im_end|>" in tokenizer.decode(ids, skip_special=False)


def test_defused_text_is_plain_text(tokenizer):
    mark = "\U000f1234"
    for text in texts(500, seed=1):
        defused = tokenizer.defuse(text, mark)
        assert defused.replace(mark, "") == text
        assert list(tokenizer.find_special(defused)) == []
        assert tokenizer.encode(defused, parse_special=True, drop=mark) == tokenizer.encode(text)
    assert tokenizer.defuse("a < b, 日本", mark) == "a < b, 日本"


@pytest.mark.parametrize("end", ["<", "<|im_", "<|im_end|", "<|im_end|>", "<|im_end  \n"])
def test_defusing_what_the_next_text_would_complete(tokenizer, end):
    defused = tokenizer.defuse("Hi " + end, "\U000f1234")
    for rest in ("|im_end|>", "end|>", "|>", ">", ""):
        for text in (defused + rest, defused.strip() + rest):
            found = [start for start, _, _ in tokenizer.find_special(text)]
            assert all(start >= len(defused.strip()) for start in found), (text, found)


def test_many_beginnings_of_a_special_token_take_no_long(tokenizer):
    text = "<" * 200_000
    assert tokenizer.defuse(text, "\U000f1234").count("<") == len(text)  # quadratic would take minutes


# --- streaming


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special)
    return [decoder.push(i) for i in ids] + [decoder.finish()]


@pytest.mark.parametrize("skip_special", [True, False])
def test_stream_adds_up_to_decode(tokenizer, skip_special):
    rng = random.Random(0)
    for i, text in enumerate([*texts(600, seed=2), TEXT, TEXT * 3]):
        ids = tokenizer.encode(text, parse_special=True)
        if i % 3 == 1:
            ids = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(rng.randrange(80))]
        if i % 3 == 2:  # bits of characters among others
            ids = [id_ for id_ in ids * 4 if rng.random() < 0.7]
        assert "".join(stream(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special)


def test_stream_never_tells_half_a_character(tokenizer):
    text = "aé 😀 日本語 👩‍🚀\n😀😀 ελλ."
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) == text
    assert len([p for p in pieces if p]) > 5


def test_stream_tells_at_once_what_is_certain(tokenizer):
    ids = tokenizer.encode("The lamp turns, the log is written")
    told = ""
    for n, piece in enumerate(stream(tokenizer, ids)[:-1], 1):
        told += piece
        assert told == tokenizer.decode(ids[:n])


def test_unfinished_characters_show_in_the_end(tokenizer):
    ids = tokenizer.encode("ok 😀")[:-1]
    *before, last = stream(tokenizer, ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(before)
    assert last.strip("\N{REPLACEMENT CHARACTER}") == ""
    assert last


def test_a_decoder_starts_anew_after_finish(tokenizer):
    decoder = StreamDecoder(tokenizer)
    for _ in range(2):
        ids = tokenizer.encode("Hello world")
        assert "".join([decoder.push(i) for i in ids] + [decoder.finish()]) == "Hello world"
    assert decoder.finish() == ""


@pytest.mark.parametrize("what", ["text", "garbage"])
def test_each_id_of_a_stream_costs_the_same(tokenizer, monkeypatch, what):
    decoded = []
    decode = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, skip=True: decoded.append(len(ids)) or decode(self, ids, skip)
    )
    lead = tokenizer.encode("😀")[-1 if tokenizer.is_byte(tokenizer.encode("😀")[-1]) else 0]
    ids = tokenizer.encode(TEXT) * 5 if what == "text" else [lead] * 2000
    stream(tokenizer, ids)
    assert sum(decoded) <= 30 * len(ids)


# --- the rest


def test_settings_for_training_are_ignored(kind):
    inner = tokenizers.Tokenizer.from_str(kind)
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    assert Tokenizer.from_json(inner.to_str()).encode(TEXT) == Tokenizer.from_json(kind).encode(TEXT)


def test_vocabulary(kind, tokenizer):
    assert tokenizer.vocab_size == tokenizers.Tokenizer.from_str(kind).get_vocab_size()
    id_ = tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.id_to_token(id_) == "<|im_end|>"
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.id_to_token(10**6) is None
    assert tokenizer.id_to_token(-1) is None
    assert tokenizer.decode([10**6]) == ""


def test_without_special_tokens():
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.encode("<|im_end|>", parse_special=True) == tokenizer.encode("<|im_end|>")
    assert tokenizer.defuse("<|im_end|>", "x") == "<|im_end|>"


def test_lone_surrogates(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\udcff")


def test_threads(tokenizer):
    expected = {flag: tokenizer.encode("a<s>b" * 50, parse_special=flag) for flag in (True, False)}
    wrong = []

    def work(flag):
        for _ in range(100):
            ids = tokenizer.encode("a<s>b" * 50, parse_special=flag)
            if ids != expected[flag] or "a" not in tokenizer.decode(ids):
                wrong.append(ids)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"model": {"type": "BPE"}}', "x\ny"])
def test_damaged_json(text):
    with pytest.raises(CheckpointError, match=r"the tokenizer cannot be read .*tokenizer\.json") as caught:
        Tokenizer.from_json(text)
    assert "\n" not in str(caught.value)


def test_files(tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        Tokenizer.from_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        Tokenizer.from_file(path)
    path.write_text(kind, encoding="utf-8")
    assert Tokenizer.from_file(path).encode("Hi") == Tokenizer.from_json(kind).encode("Hi")
    path.write_text(kind[: len(kind) // 2], encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"fetch the model's tokenizer\.json again"):
        Tokenizer.from_file(path)
