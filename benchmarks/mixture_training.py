"""Trains a small Mixtral-shaped model on text: 8 experts of which 2 are active, some 14 M parameters, 4,096 tokens.

With `--inner 128 --experts 32 --active 4` its experts are many and narrow, as those of OLMoE, Qwen3 and DeepSeek are.
No published mixture fits a machine of two cores, and random experts have no structure to find. The tokenizer is a
byte-level BPE, trained on the same text. The result is an ordinary folder, for ``benchmarks/mixture.py``.

    python benchmarks/mixture_training.py --text FILE [--text FILE] --minutes 30 FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from svdllm.common.device import resolve_device
from svdllm.data import evaluation_tokens
from svdllm.data.sources import documents_of_spec
from svdllm.data.specs import parse_spec

END = "<end>"
RECORD = "training.json"  # beside the model
WARM_UP = 0.04  # share of the training


def trained_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the most frequent pairs of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def mixture_config(args: argparse.Namespace) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.inner or 2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        num_local_experts=args.experts,
        num_experts_per_tok=args.active,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,  # adds the loss that balances the experts
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def batches(ids: torch.Tensor, size: int, seqlen: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Windows at random places, without end: (size, seqlen)."""
    while True:
        starts = torch.randint(len(ids) - seqlen, (size,), generator=generator)
        yield torch.stack([ids[start : start + seqlen] for start in starts])


def train(model: MixtralForCausalLM, ids: torch.Tensor, args: argparse.Namespace, device: torch.device) -> int:
    """Trains for so many minutes, with a cosine of the time for the step size; returns the number of steps.

    Minutes are of processor time on a CPU, by thread: another program on the machine takes nothing from the training.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    drawn = batches(ids, args.batch, args.seqlen, torch.Generator().manual_seed(args.seed))
    clock, threads = (time.process_time, torch.get_num_threads()) if device.type == "cpu" else (time.monotonic, 1)
    started, step = clock(), 0
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))  # what is learnt is saved
    model.train()
    while (done := (clock() - started) / (60 * args.minutes * threads)) < 1 and not ended:
        scale = min(done / WARM_UP, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * max(scale, 1e-3)
        windows = next(drawn).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {done:.0%}: loss {loss.item():.3f}", flush=True)
    signal.signal(signal.SIGTERM, before)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="new folder for the model")
    parser.add_argument("--text", action="append", required=True, help="training text: file or name; may be repeated")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, help="inner features of an expert; twice --hidden by default, as Mixtral")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2, help="experts that a token is routed to")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16, help="windows of a step")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = resolve_device(args.device)
    sources = [documents_of_spec(parse_spec(text), evaluation=False, offline=False) for text in args.text]
    texts = [[str(row) for row in source.all_rows()] for source in sources]
    tokenizer = trained_tokenizer([row for rows in texts for row in rows], args.vocab)
    ids = torch.cat([evaluation_tokens(rows, tokenizer) for rows in texts])
    torch.manual_seed(args.seed)
    model = MixtralForCausalLM(mixture_config(args)).to(device)
    model.set_experts_implementation("eager" if device.type == "cpu" else "grouped_mm")
    print(f"{model.num_parameters():,} parameters, {len(ids):,} tokens of text", flush=True)
    steps = train(model, ids, args, device)
    model.config.output_router_logits = False
    model.to("cpu").save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    seen = steps * args.batch * args.seqlen
    settings = {key: getattr(args, key) for key in ("minutes", "batch", "seqlen", "lr", "seed")}
    names = [Path(text).name for text in args.text]
    record = {"benchmark": "mixture_training", "steps": steps, "tokens": seen, "text": names, **settings}
    (args.output / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
