"""Fine-tune a model on prompts and completions: all its weights, or a low-rank adapter for them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from statistics import mode
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import torch_ops
from model.checkpoint.files import few
from model.checkpoint.tokenizer import Tokenizer
from model.checkpoint.weights import save_model
from model.gpt import GPT, Adapt
from model.lora import AdapterConfig, adapt_all, new_adapter, save_adapter
from model.training.data import shuffled
from model.training.plans import FinetuningPlan
from model.training.run import follow
from model.training.trainer import IGNORED, Trainer, hidden_states, next_token_loss

# The curve shows the loss on so many held-out examples during the run, and on all of them at the end.
GLANCE = 64
# Tokens computed at a time, with padding. The activations of more would need more memory than the weights.
MICRO_TOKENS = 4096


class TrainingExample(NamedTuple):
    """The model learns to write `completion` after `prompt`."""

    prompt: str
    completion: str


def read_examples(path: Path) -> list[TrainingExample]:
    """A JSONL file of {"prompt", "completion"}. Raises ValueError naming file and line."""
    examples = []
    try:
        with path.open(encoding="utf-8") as file:  # str.splitlines would end a line at U+2028 too
            lines = [line.rstrip("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        where = f"{path.name}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.keys() != {"prompt", "completion"}:
            raise ValueError(f'{where}: expected an object of "prompt" and "completion", got {line[:80]!r}')
        example = TrainingExample(**fields)
        for name, text in example._asdict().items():
            if not isinstance(text, str):
                raise ValueError(f"{where}: {name} must be a text, got {repr(text)[:80]}")
        if not example.completion:
            raise ValueError(f"{where}: the completion is empty")
        examples.append(example)
    if not examples:
        raise ValueError(f"{path.name} holds no examples")
    return examples


def advice(examples: Sequence[TrainingExample]) -> list[str]:
    """How the file could be better, with line numbers.

    Every prompt should end in one separator, which no prompt holds elsewhere. Every completion should begin with a space,
    and all should end in the same text.
    """
    found = []
    prompts, completions = [example.prompt for example in examples], [example.completion for example in examples]
    separator, ending = common_suffix(prompts), common_suffix(completions)
    if any(prompts) and not separator:
        usual = mode(text[-1:] for text in prompts)
        odd = lines([not text.endswith(usual) for text in prompts])
        found.append(f'end every prompt with the same separator, such as "\\n###\\n" or " =>"; unlike most: {odd}')
    elif separator.strip():
        inside = [separator.strip() in prompt[: len(prompt) - len(separator)] for prompt in prompts]
        if any(inside):
            found.append(f"the separator {separator!r} is inside the prompt too: {lines(inside)}")
    unspaced = [not completion[0].isspace() for completion in completions]
    if any(unspaced):
        found.append(f"begin every completion with a space, as words are tokens with one: {lines(unspaced)}")
    if len(set(completions)) > 1 and not ending and any(len(text.split()) > 1 for text in completions):
        found.append('end every completion with the same text, such as "\\n" or " END", to stop at')
    first_place = {example: place for place, example in reversed(list(enumerate(examples)))}
    repeated = [first_place[example] < place for place, example in enumerate(examples)]
    if any(repeated):
        found.append(f"leave out what stands there before: {lines(repeated)}")
    return found


def common_suffix(texts: Sequence[str]) -> str:
    """The longest ending of all texts; none for a single text."""
    if len(texts) < 2:
        return ""
    backwards = sorted(text[::-1] for text in texts)  # the first and the last share only what all share
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(backwards[0], backwards[-1], strict=False))
    return "".join(letter for letter, _ in pairs)[::-1]


def lines(flags: Sequence[bool]) -> str:
    """The numbers of the flagged lines."""
    numbers = [number for number, flag in enumerate(flags, 1) if flag]
    return f"line{'s' * (len(numbers) != 1)} {few(numbers)}"


class Encoded(NamedTuple):
    """The tokens of an example, and for each the token that follows it: IGNORED inside the prompt."""

    inputs: list[int]
    targets: list[int]


def encode(examples: Sequence[TrainingExample], tokenizer: Tokenizer, context: int) -> list[Encoded]:
    """Prompt, completion, and eos if there is one. Raises ValueError naming the lines that don't fit the context."""
    encoded = []
    for prompt, completion in examples:
        before = tokenizer.encode_prompt(prompt)
        tokens = [*before, *tokenizer.checked(tokenizer.encode(completion)), *tokenizer.ending]
        targets = [IGNORED] * (len(before) - 1) + tokens[len(before) :]
        encoded.append(Encoded(tokens[:-1], targets))
    too_long = [len(example.inputs) > context for example in encoded]
    if any(too_long):
        longest = max(len(example.inputs) for example in encoded)
        raise ValueError(f"the model's context is {context} tokens; longer, up to {longest}: {lines(too_long)}")
    return encoded


def padded(examples: Sequence[Encoded], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of B examples of up to T tokens. Padding is IGNORED, and no token of an example sees it."""
    length = max(len(example.inputs) for example in examples)
    inputs = [example.inputs + [0] * (length - len(example.inputs)) for example in examples]
    targets = [example.targets + [IGNORED] * (length - len(example.targets)) for example in examples]
    return torch.tensor(inputs, device=device), torch.tensor(targets, device=device)


def finetuning_plan(
    examples: Sequence[Encoded], *, epochs: int, batch: int, learning_rate: float, seed: int = 0
) -> FinetuningPlan:
    total, longest = len(examples) * epochs, max(len(example.inputs) for example in examples)
    micro = max(1, MICRO_TOKENS // longest)
    return FinetuningPlan(total=total, batch=min(batch, total), learning_rate=learning_rate, micro_batch=micro, seed=seed)


def finetune(
    directory: Path,
    model: GPT,
    examples: Sequence[Encoded],
    plan: FinetuningPlan,
    *,
    base: str,
    adapter: AdapterConfig | None,
    held_out: Sequence[Encoded] = (),
    resume: bool = False,
    save_every: float = 60,
    origin: Path | None = None,
) -> float | None:
    """Learn the completions of `examples`: an adapter of `model`, fp32, or all its weights if `adapter` is None.

    `directory` gets state and result: see model.training.run.follow. `base` is the model's weights_digest, which an adapter
    keeps. `origin` is the model's directory: see `save_model`. Returns the loss on `held_out` at the end.
    """
    device = model.head.device
    learnt = None if adapter is None else new_adapter(model, adapter, base, plan.seed)
    model.requires_grad_(learnt is None)
    adapt = None if learnt is None else adapt_all(learnt)
    parameters: Mapping[str, Tensor] = dict(model.named_parameters()) if learnt is None else learnt.tensors
    trainer = Trainer(parameters, plan, lambda inputs, targets: next_token_loss(model, inputs, targets, adapt))

    def batches(first: int, count: int, _window: int) -> tuple[Tensor, Tensor]:
        places = [divmod(number, len(examples)) for number in range(first, first + count)]
        orders = {epoch: shuffled(plan.seed, epoch, len(examples)).tolist() for epoch, _ in places}
        return padded([examples[orders[epoch][place]] for epoch, place in places], device)

    def held_out_loss(whole: bool) -> float:
        return completion_loss(model, held_out if whole else held_out[:GLANCE], adapt)

    digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    save_weights = partial(save_model, directory, model, torch.bfloat16, origin=origin)
    write_model = save_weights if learnt is None else partial(save_adapter, directory, learnt)
    return follow(
        directory,
        trainer,
        batches,
        {"base": base, "adapter": None if adapter is None else dataclasses.asdict(adapter), "examples": digest},
        write_model=write_model,
        held_out_loss=held_out_loss if held_out else None,
        resume=resume,
        save_every=save_every,
    )


@torch.inference_mode()
def completion_loss(model: GPT, examples: Sequence[Encoded], adapt: Adapt | None = None, batch: int = 8) -> float:
    """Mean loss in nats over all tokens of the completions and the eos after them, in the dtype of the weights."""
    total, count = 0.0, 0
    by_length = sorted(examples, key=lambda example: len(example.inputs))
    for start in range(0, len(by_length), batch):
        inputs, targets = padded(by_length[start : start + batch], model.head.device)
        hidden = hidden_states(model, inputs, adapt)
        counted = targets != IGNORED
        losses = F.cross_entropy(model.logits(hidden[counted], torch_ops), targets[counted], reduction="sum")
        total += losses.item()
        count += int(counted.sum())
    return total / count
