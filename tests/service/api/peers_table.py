"""What becomes of other servers' fields: `python -m tests.service.api.peers_table` writes the table of docs/api.md."""

from pathlib import Path

from service.api.schema.chat import ChatRequest
from service.api.schema.completions import CompletionRequest
from service.api.schema.peers import PEER_FIELDS, PeerField

PAGE = Path(__file__).parents[3] / "docs/api.md"
HEAD = "| fields | of | here |\n|---|---|---|\n"


def outcome(field: PeerField, names: list[str]) -> str:
    in_completions, in_chats = ([name in body.model_fields for name in names] for body in (CompletionRequest, ChatRequest))
    if all(in_completions) and all(in_chats):
        return "honoured"
    taken = f"accepted at {', '.join(f'`{value}`' for value in field.accepted.split(', '))}"
    if field.part_of:
        taken = f"{taken}; at any value where `{field.part_of}` changes nothing"
    if field.warning:
        taken = f"{taken}; at others with a warning: {field.warning}"
    if all(in_chats):
        return f"honoured in chats; in completions {taken}"
    if all(in_completions):
        return f"honoured in completions; in chats {taken}"
    assert not any(in_completions + in_chats), f"{names} have different outcomes"
    return taken


def table() -> str:
    rows = []
    for field in PEER_FIELDS:
        names = field.names.split()
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {field.servers} | {outcome(field, names)} |\n")
    return HEAD + "".join(rows)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(HEAD)
    PAGE.write_text(before + table() + "\n" + rest.split("\n\n", 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
