"""Layouts equal their definition, written out as text and tokenized whole. No user's text becomes a special token."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint.prompt_format import PromptFormat, Turn
from model.checkpoint.tokenizer import END_OF_TEXT, Tokenizer, r50k_base
from service.engine.prompts import Example, FewShot, chat_prompt, few_shot_prompt, insertion_prompt
from service.engine.request import ExampleCounts, Prompt, RequestError, text_prompt

R50K = r50k_base()
END = R50K.special_tokens[END_OF_TEXT]
SPECIAL = {END_OF_TEXT: END, "<s>": 50257, "<|im_start|>": 50258, "<|im_end|>": 50259, "<<s>": 50260, "§": 50261}


def with_specials(bos_id: int | None) -> Tokenizer:
    """r50k with more special tokens: one of a single character, and one that contains another."""
    tokens = {token: R50K.token_bytes(token) for token in range(END)}
    names = {token: name.encode() for name, token in SPECIAL.items()}
    return Tokenizer(tokens | names, range(END), special=SPECIAL, added={}, eos_id=END, bos_id=bos_id)


PLAIN, WITH_BOS = with_specials(None), with_specials(SPECIAL["<s>"])
TOKENIZERS = st.sampled_from([PLAIN, WITH_BOS])
WORDS = st.sampled_from(
    [*SPECIAL, "<", "<|", "|>", "s>", "<|im", "_end|>", "<|endof", "text|>", "a", " b", "User:", "\n", " ", "é", "<<", "=> "]
)
TEXTS = st.lists(WORDS | st.text(max_size=4), max_size=6).map("".join)
FAST = settings(max_examples=300, deadline=None)


def special_in(tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token in SPECIAL.values()]


class TestText:
    @FAST
    @given(text=TEXTS, tokenizer=TOKENIZERS, allow_special=st.booleans())
    def test_as_the_tokenizer_does(self, text: str, tokenizer: Tokenizer, allow_special: bool) -> None:
        prompt = text_prompt(text, tokenizer, allow_special=allow_special)
        tokens = tokenizer.encode(text, allow_special=allow_special)
        assert prompt.tokens[prompt.num_implicit :] == tokens
        if not allow_special:
            assert prompt.tokens == tokenizer.encode_prompt(text), "fine-tuning begins its examples like this"
        implicit = [tokenizer.bos_id] if tokenizer.bos_id is not None else [] if tokens else [tokenizer.eos_id]
        assert prompt.tokens[: prompt.num_implicit] == implicit

    def test_implicit_tokens(self) -> None:
        assert text_prompt("", PLAIN) == Prompt([END], num_implicit=1)
        assert text_prompt("a", PLAIN) == Prompt([64], num_implicit=0)
        assert text_prompt("", WITH_BOS) == Prompt([50257], num_implicit=1)
        assert text_prompt("<s>", WITH_BOS, allow_special=True) == Prompt([50257, 50257], num_implicit=1)


def test_a_word_that_is_too_long_is_the_requests_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.tokenizer.PIECE", 50)  # shorter texts are not searched for such words
    monkeypatch.setattr("model.checkpoint.tokenizer.MAX_WORD", 100)
    word, card = "x" * 200, PromptFormat(insertion="{prompt}|{suffix}")
    for lay_out in (
        lambda: insertion_prompt("a", f" {word}", card, PLAIN),
        lambda: few_shot_prompt(word, FewShot([], None), PromptFormat(), PLAIN, context=2048, max_tokens=1),
    ):
        with pytest.raises(RequestError) as refused:
            lay_out()
        assert re.fullmatch(r"'prompt': holds a word of \d+ bytes, at most 100 can be tokenized", str(refused.value))
    with pytest.raises(RequestError, match=r"^'messages': holds a word of \d+ bytes, at most 100 can be tokenized$"):
        chat_prompt([Turn("user", word)], PromptFormat(), PLAIN)


OTTER = FewShot([Example("sea otter", "loutre de mer")], "Translate English to French.")


def few_shot(
    query: str, shots: FewShot, *, tokenizer: Tokenizer = PLAIN, prompt_format: PromptFormat | None = None, **options: Any
) -> Prompt:
    limits = {"context": 2048, "max_tokens": 16}
    return few_shot_prompt(query, shots, prompt_format or PromptFormat(), tokenizer, **limits | options)


def laid_out(query: str, shots: FewShot, dropped: int, allow_special: bool) -> list[tuple[str, bool]]:
    """The contract's definition of the layout. No field of `shots` may be None."""
    own, separator = allow_special, (str(shots.separator), True)
    input_prefix, output_prefix = (str(shots.input_prefix), own), (str(shots.output_prefix), own)
    parts = [(shots.instruction, own), separator] if shots.instruction else []
    for example in shots.examples[dropped:]:
        parts += [input_prefix, (example.input, own), output_prefix, (example.output, own), separator]
    return [*parts, input_prefix, (query, own), (str(shots.output_prefix).rstrip(" "), own)]


class TestFewShot:
    def test_example_of_the_contract(self) -> None:
        prompt = few_shot("cheese", OTTER)
        text = "Translate English to French.\n###\nsea otter => loutre de mer\n###\ncheese =>"
        assert prompt == Prompt(PLAIN.encode(text), 0, stops=("\n###\n",), few_shot=ExampleCounts(1, 0))

    def test_of_nothing(self) -> None:
        bare = FewShot([], instruction="", input_prefix="", output_prefix=" ", separator="")
        assert few_shot("", bare) == Prompt([END], 1, few_shot=ExampleCounts(0, 0))
        assert few_shot("", bare, tokenizer=WITH_BOS) == Prompt([50257], 1, few_shot=ExampleCounts(0, 0))

    def test_fields_of_the_prompt_format(self) -> None:
        """The format's own fields may hold special tokens. A user's text may not."""
        prompt_format = PromptFormat(separator="<|im_end|>", input_prefix="<|im_start|>in ", output_prefix="<s>out  ")
        prompt = few_shot("c<s>", FewShot([Example("a", "<s>b")]), prompt_format=prompt_format)
        encode = PLAIN.encode
        tokens = [
            50258,
            *encode("in a"),
            50257,
            *encode("out  <s>b"),
            50259,
            50258,
            *encode("in c<s>"),
            50257,
            *encode("out"),
        ]
        assert prompt == Prompt(tokens, 0, stop_token_ids=(50259,), few_shot=ExampleCounts(1, 0))
        assert (
            special_in(
                few_shot("c", FewShot([], input_prefix="<s>", output_prefix="<s>"), prompt_format=prompt_format).tokens
            )
            == []
        )

    @pytest.mark.parametrize(
        ("separator", "stops", "stop_token_ids"),
        [
            ("\n", ("\n",), ()),
            (END_OF_TEXT, (), (END,)),
            (f"\n{END_OF_TEXT}\n", (), (END,)),
            ("<|im_end|><s>", (), (50259,)),
            ("<|im_end", ("<|im_end",), ()),
            ("", (), ()),
        ],
    )
    def test_separator_ends_the_completion(
        self, separator: str, stops: tuple[str, ...], stop_token_ids: tuple[int, ...]
    ) -> None:
        prompt = few_shot("c", FewShot([Example("a", "b")], separator=separator))
        assert (prompt.stops, prompt.stop_token_ids) == (stops, stop_token_ids)
        assert prompt.tokens == PLAIN.encode(f"a => b{separator}c =>", allow_special=True)

    @FAST
    @given(
        shots=st.builds(
            FewShot,
            examples=st.lists(st.builds(Example, TEXTS, TEXTS), max_size=4),
            instruction=TEXTS,
            input_prefix=TEXTS,
            output_prefix=TEXTS,
            # With these separators, an example's tokens do not depend on its neighbours.
            separator=st.sampled_from(["\n###\n", END_OF_TEXT]),
            on_overflow=st.just("drop"),
        ),
        query=TEXTS,
        tokenizer=TOKENIZERS,
        context=st.integers(1, 150),
        max_tokens=st.integers(0, 20),
        allow_special=st.booleans(),
    )
    def test_drops_the_oldest_until_it_fits(
        self, shots: FewShot, query: str, tokenizer: Tokenizer, context: int, max_tokens: int, allow_special: bool
    ) -> None:
        """The oracle tries every number of examples to drop."""

        def tokens(dropped: int) -> list[int]:
            encoded = tokenizer.encode_parts(laid_out(query, shots, dropped, allow_special))
            return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + encoded or [END]

        options: dict[str, Any] = {"tokenizer": tokenizer, "context": context, "max_tokens": max_tokens}
        options["allow_special"] = allow_special
        total = len(shots.examples)
        fitting = [dropped for dropped in range(total + 1) if len(tokens(dropped)) + max_tokens <= context]
        if fitting:
            prompt = few_shot(query, shots, **options)
            assert prompt.tokens == tokens(fitting[0])
            assert prompt.few_shot == ExampleCounts(total - fitting[0], fitting[0])
        else:
            with pytest.raises(RequestError):
                few_shot(query, shots, **options)
        strict = shots._replace(on_overflow="error")
        if 0 in fitting:
            assert few_shot(query, strict, **options) == prompt
        else:
            with pytest.raises(RequestError):
                few_shot(query, strict, **options)

    @pytest.mark.parametrize(
        ("on_overflow", "max_tokens", "message"),
        [
            (
                "error",
                4,
                "This model's maximum context length is 20 tokens, but the request asks for 25 tokens "
                "(21 in the prompt with 3 of its 3 examples, 4 for the completion): the prompt is too long",
            ),
            (
                "drop",
                18,
                "This model's maximum context length is 20 tokens, but the request asks for 21 tokens "
                "(3 in the prompt with 0 of its 3 examples, 18 for the completion)",
            ),
        ],
    )
    def test_overflow(self, on_overflow: Any, max_tokens: int, message: str) -> None:
        shots = FewShot([Example("a", "b")] * 3, input_prefix="", output_prefix=" =>", on_overflow=on_overflow)
        with pytest.raises(RequestError) as refusal:
            few_shot("two words", shots, context=20, max_tokens=max_tokens)
        assert str(refusal.value) == message
        assert refusal.value.param == "prompt"

    def test_drops_from_the_front(self) -> None:
        shots = FewShot([Example(str(n), str(n + 1)) for n in range(9)])
        prompt = few_shot("9", shots, context=40, max_tokens=0)
        assert prompt.few_shot is not None
        used, dropped = prompt.few_shot
        assert used + dropped == 9
        assert 0 < used < 9
        assert PLAIN.decode(prompt.tokens).startswith(f"{dropped} => {dropped + 1}\n###\n")
        with pytest.raises(RequestError):
            few_shot(
                "9", shots._replace(examples=shots.examples[dropped - 1 :], on_overflow="error"), context=40, max_tokens=0
            )

    def test_far_too_much_text_is_not_tokenized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shots = FewShot([Example("x" * 1_000_000, "y")] * 2 + [Example("x", "y")], on_overflow="error")
        sizes = []
        encode_parts = Tokenizer.encode_parts

        def measure(tokenizer: Tokenizer, parts: Iterable[tuple[str, bool]]) -> list[int]:
            parts = list(parts)
            sizes.append(sum(len(text) for text, _ in parts))
            return encode_parts(tokenizer, parts)

        monkeypatch.setattr(Tokenizer, "encode_parts", measure)
        asked = r"asks for at least 15642 tokens \(15626 in the prompt with 3 of its 3 examples, 16 for the completion\)"
        with pytest.raises(RequestError, match=asked):
            few_shot("c", shots)
        prompt = few_shot("c", shots._replace(on_overflow="drop"))
        assert prompt.few_shot == ExampleCounts(1, 2)
        assert max(sizes) < 100


CHATML = PromptFormat(
    chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    stop=("<|im_end|>", "\n\n"),
)
BORDERLESS = PromptFormat(chat_template="{% for m in messages %}{{ m.content | trim }}{% endfor %}", stop=())
MESSAGES = st.lists(st.builds(Turn, st.sampled_from(["user", "assistant", "system"]), TEXTS), max_size=4)


class TestChat:
    def test_default_template(self) -> None:
        prompt = chat_prompt([Turn("user", "Hi"), Turn("system", "Be brief.")], PromptFormat(), PLAIN)
        assert prompt == Prompt(PLAIN.encode("Be brief.\n\nUser: Hi\nAssistant:"), 0, stops=("\nUser:",))

    def test_special_tokens_of_the_template_are_special(self) -> None:
        prompt = chat_prompt([Turn("user", "<|im_end|>")], CHATML, PLAIN)
        encode = PLAIN.encode
        tokens = [50258, *encode("user\n<|im_end|>"), 50259, *encode("\n"), 50258, *encode("assistant\n")]
        assert prompt == Prompt(tokens, 0, stops=("\n\n",), stop_token_ids=(50259,))

    @FAST
    @given(messages=MESSAGES, tokenizer=TOKENIZERS, prompt_format=st.sampled_from([CHATML, BORDERLESS, PromptFormat()]))
    def test_contents_never_become_special(
        self, messages: list[Turn], tokenizer: Tokenizer, prompt_format: PromptFormat
    ) -> None:
        prompt = chat_prompt(messages, prompt_format, tokenizer)
        text = prompt_format.render_chat(messages, bos_token="", eos_token="")
        tokens = prompt.tokens[prompt.num_implicit :]
        assert tokenizer.decode(tokens) == text
        written = [50258, 50259] * len(messages) + [50258] if prompt_format is CHATML else []
        assert special_in(tokens) == written
        if not written:
            assert tokens == tokenizer.encode(text)

    @FAST
    @given(messages=MESSAGES, prompt_format=st.sampled_from([CHATML, BORDERLESS, PromptFormat()]))
    def test_special_text_in_contents_where_allowed(self, messages: list[Turn], prompt_format: PromptFormat) -> None:
        text = prompt_format.render_chat(messages, bos_token="", eos_token="")
        expected = PLAIN.encode(text, allow_special=True) or [END]
        assert chat_prompt(messages, prompt_format, PLAIN, allow_special=True).tokens == expected

    @pytest.mark.parametrize(
        "contents",
        [["<|im_", "end|>"], ["<|im_ ", " end|>"], ["<", "|im_end|>"], ["<<s>", "<<<s>"], ["§§"], ["<", "s>"]],
    )
    def test_names_that_contents_make_together(self, contents: list[str]) -> None:
        messages = [Turn("user", content) for content in contents]
        tokens = chat_prompt(messages, BORDERLESS, PLAIN).tokens
        assert tokens == PLAIN.encode("".join(content.strip() for content in contents))

    @pytest.mark.parametrize("content", ["s>", " s> b", "|im_end|>", "s><s", "a < "])
    def test_names_that_template_and_content_make_together(self, content: str) -> None:
        prompt_format = PromptFormat(chat_template="<s><{{ messages[0].content | trim }}|im_end|>", stop=())
        tokens = chat_prompt([Turn("user", content)], prompt_format, PLAIN).tokens
        assert tokens == [50257, *PLAIN.encode(f"<{content.strip()}|im_end|>")]

    def test_names_that_begin_with_a_line_break(self) -> None:
        tokenizer = Tokenizer(
            {token: R50K.token_bytes(token) for token in range(END)} | {END: b"\n>"},
            range(END),
            special={"\n>": END},
            added={},
            eos_id=END,
        )
        prompt_format = PromptFormat(chat_template="\n>{{ messages[0].content }}\n>", stop=())
        tokens = chat_prompt([Turn("user", "a\n>b")], prompt_format, tokenizer).tokens
        assert tokens == [END, *R50K.encode("a\n>b"), END]

    def test_contents_without_special_text_are_unchanged(self) -> None:
        template = "{{ messages[0].content | length }} {{ messages[0].content == 'a < b | <s' }}"
        prompt_format = PromptFormat(chat_template=template)
        assert PLAIN.decode(chat_prompt([Turn("user", "a < b | <s!")], prompt_format, PLAIN).tokens) == "11 False"
        assert PLAIN.decode(chat_prompt([Turn("user", "a < b > c")], prompt_format, PLAIN).tokens) == "9 False"

    def test_bos_is_written_once(self) -> None:
        own = PromptFormat(chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
        tokens = [50257, 64, END]
        assert chat_prompt([Turn("user", "a")], own, WITH_BOS) == Prompt(tokens, 1, stops=("\nUser:",))
        without = PromptFormat(chat_template="{{ messages[0].content }}{{ eos_token }}")
        assert chat_prompt([Turn("user", "a")], without, WITH_BOS) == Prompt(tokens, 1, stops=("\nUser:",))
        # A tokenizer without bos: a chat template may still write one if the checkpoint names it.
        assert chat_prompt([Turn("user", "a")], own, PLAIN).tokens == [64, END]
        named = PromptFormat(chat_template=own.chat_template, token_names={"bos_token": "<s>"})
        assert chat_prompt([Turn("user", "a")], named, PLAIN) == Prompt(tokens, 0, stops=("\nUser:",))

    def test_a_model_without_a_template_that_works_refuses_chats(self) -> None:
        broken = PromptFormat(chat_problem="chat_template does not compile: line 2: no")
        with pytest.raises(RequestError, match="'messages': the model can't chat: chat_template does not compile: line 2"):
            chat_prompt([Turn("user", "a")], broken, PLAIN)

    def test_empty_rendering_is_a_new_document(self) -> None:
        assert chat_prompt([], BORDERLESS, PLAIN) == Prompt([END], 1)
        assert chat_prompt([], BORDERLESS, WITH_BOS) == Prompt([50257], 1)
        tokens = {token: R50K.token_bytes(token) for token in range(END)}
        endless = Tokenizer(tokens, range(END), special={}, added={}, eos_id=None)
        with pytest.raises(RequestError, match="'messages': an empty prompt needs a token that starts a document, and"):
            chat_prompt([], BORDERLESS, endless)
        template = PromptFormat(chat_template="{{ messages[0].content }}{{ eos_token }}")
        assert chat_prompt([Turn("user", "a")], template, endless).tokens == [64]

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{{ raise_exception('no ' + messages[0].content) }}", r"no <s>\\ud800"),
            ("{{ raise_exception('x' * 1000) }}", "x{200}"),
            ("{{ messages[0].name.first }}", "'dict object' has no attribute 'name'"),
            ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
            ("{{ messages[0].content + 1 }}", 'can only concatenate str .not "int". to str'),
            ("{{ 1 // 0 }}", "integer division or modulo by zero|division by zero"),
            ("{{ range(10 ** 9) }}", "Range too big.*"),
        ],
    )
    def test_errors_of_the_template(self, template: str, reason: str) -> None:
        with pytest.raises(RequestError, match=f"^the model's chat template does not take these messages: ({reason})$") as e:
            chat_prompt([Turn("user", "<s>\ud800")], PromptFormat(chat_template=template), PLAIN)
        assert e.value.param == "messages"
        assert (e.value.param, e.value.code) == ("messages", None)

    def test_role_that_the_default_template_does_not_know(self) -> None:
        with pytest.raises(RequestError, match=r"messages: role 'tool' is not supported$"):
            chat_prompt([Turn("tool", "4")], PromptFormat(), PLAIN)


class TestInsertion:
    FORMAT = PromptFormat(insertion="<|im_start|>{suffix}{{<|im_end|>{prompt}<s>")

    def test_layout(self) -> None:
        prompt = insertion_prompt("a<s>", "b", self.FORMAT, WITH_BOS)
        encode = PLAIN.encode
        assert prompt == Prompt([50257, 50258, *encode("b{"), 50259, *encode("a<s>"), 50257], 1)
        allowed = insertion_prompt("a<s>", "b", self.FORMAT, PLAIN, allow_special=True)
        assert allowed == Prompt([50258, *encode("b{"), 50259, 64, 50257, 50257], 0)

    def test_texts_are_no_formats(self) -> None:
        assert (
            PLAIN.decode(insertion_prompt("{suffix}", "{", PromptFormat(insertion="{prompt}|{suffix}"), PLAIN).tokens)
            == "{suffix}|{"
        )

    def test_model_that_can_not_insert(self) -> None:
        with pytest.raises(RequestError) as refusal:
            insertion_prompt("a", "b", PromptFormat(), PLAIN)
        message = "'suffix' is not supported by this model: its card declares no format for insertions"
        assert (str(refusal.value), refusal.value.param) == (message, "suffix")
