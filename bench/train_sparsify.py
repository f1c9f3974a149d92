"""A training by sparsify as its README has it, on the embedded model and corpus: the program that
`bench/train.py --whole-process` times.

    python bench/train_sparsify.py MODEL CORPUS OUT LAYERS LATENTS K LR TOKENS BATCH_TOKENS

Nothing of resae is imported: all that this process costs is the peer's. Of the corpus it tokenizes
only what it trains on, which takes less time and memory than sparsify's own `chunk_and_tokenize` of
the whole.
"""

import sys
from typing import Any

import torch
from datasets import Dataset, load_dataset
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT_TOKENS = 128


def main() -> None:
    model_folder, corpus, out, layers, *numbers = sys.argv[1:]
    latents, k, lr, tokens, batch_tokens = int(numbers[0]), int(numbers[1]), *numbers[2:]
    rows, steps = int(tokens) // CONTEXT_TOKENS, int(tokens) // int(batch_tokens)
    dataset = load_dataset("parquet", data_files=f"{corpus}/train.parquet", split="train")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids: list[int] = []
    documents: Any = dataset.shuffle(seed=0)
    for document in documents:
        ids += tokenizer(document["text"])["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) >= int(tokens):
            break
    tokenized = Dataset.from_dict(
        {"input_ids": [ids[i * CONTEXT_TOKENS :][:CONTEXT_TOKENS] for i in range(rows)]}
    ).with_format("torch")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = TrainConfig(
        SparseCoderConfig(num_latents=latents, k=k),
        batch_size=int(batch_tokens) // CONTEXT_TOKENS,
        optimizer="adam",
        lr=float(lr),
        lr_warmup_steps=max(1, steps // 20),
        exclude_tokens=[0],
        layers=[int(layer) for layer in layers.split(",")],
        log_to_wandb=False,
        save_dir=out,
    )
    Trainer(config, tokenized, model).fit()


if __name__ == "__main__":
    main()
