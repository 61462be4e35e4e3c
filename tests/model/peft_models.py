"""Models of transformers with random adapters of PEFT."""

from pathlib import Path
from typing import Any

import torch


def wrapped(base: Path, **fields: Any) -> Any:
    """A model of transformers with a random adapter of PEFT."""
    # Importing them takes seconds.
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **fields)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    return adapted
