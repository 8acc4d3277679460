"""Distillation of a small encoder for both stages; see script/distill_encoder.py."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from torch_src.data.collection import PassageCollection
from torch_src.data.formats import parse_dual_row
from torch_src.data.lines import read_lines
from torch_src.models.backbones import folder_settings, load_config, model_checksum
from torch_src.models.cross_encoder import CrossEncoder
from torch_src.models.dual_encoder import load_backbone
from torch_src.models.tokenization import TextRules, load_tokenizer, save_tokenizer, tokenizer_checksum
from torch_src.retrieval.encoding import Encoder
from torch_src.runtime.commands import command
from torch_src.runtime.devices import choose_device, choose_precision, set_threads, token_budget
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_folder, write_json
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import log
from torch_src.runtime.stamps import checksum_text
from torch_src.tools.distillation import (
    DistillationBatches,
    DistillationTask,
    Question,
    make_texts,
    teacher_vectors,
)
from torch_src.tools.shrinking import shrink_model, shrink_tokenizer
from torch_src.training.distributed import Processes
from torch_src.training.grad_cache import Chunking
from torch_src.training.trainer import Trainer, TrainerOptions

PREFIXES = {"query": "query_prefix", "passage": "passage_prefix"}
COUNTED_TEXTS = 20_000  # for the choice of tokens
SAMPLED_TEXTS, SAMPLED_AT_ONCE = 256, 32  # for the choice of neurons
NOT_STAMPED = ("to", "threads", "device")
CPU_TOKENS = 2048  # in a forward pass


def read_passages(folders: list[str], limit: int, seed: int) -> list[str]:
    """Return the distinct passages of the data folders, at most `limit` random ones of each."""
    found: list[str] = []
    for folder in folders:
        collection = PassageCollection(Path(folder) / "passage-collection")
        rows = np.random.default_rng([seed, 0]).permutation(len(collection))[: limit or None]
        found += [collection[int(row)] for row in sorted(rows)]
    return list(dict.fromkeys(text for text in found if text.strip()))


def read_questions(folders: list[str]) -> list[Question]:
    """Return the training questions of the data folders that have some, with positives and negatives."""
    found: dict[str, Question] = {}
    for folder in folders:
        path = Path(folder) / "train/dual.train.tsv"
        for line, text in read_lines(path) if path.exists() else ():
            row = parse_dual_row(text, path, line)
            question = found.setdefault(row.query, Question(row.query, [], []))
            question.positives.append(row.positive)
            question.negatives.append(row.negative)
    return [
        Question(q.text, list(dict.fromkeys(q.positives)), sorted({*q.negatives} - {*q.positives}))
        for q in found.values()
    ]


def check_groups(questions: list[Question], group_size: int) -> None:
    """UserError for a question whose group cannot be filled: no other has a positive that is not its own."""
    positives = {question.positives[0] for question in questions}
    for question in questions:
        if len(question.negatives) < group_size - 1 and positives <= {*question.positives}:
            fix = "lower --group_size, or pass --questions 0"
            raise UserError(f"{question.text}: too few passages for a group of {group_size}; {fix}")


def teacher_encoders(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Encoder], str]:
    """Return the teacher's encoders of queries and passages, and a checksum of it and its settings."""
    stated = folder_settings(args.teacher)
    given = {name: getattr(args, name) for name in ("pooling", "normalize", *PREFIXES.values())}
    used = {**{"pooling": "cls", "query_prefix": "", "passage_prefix": ""}, **stated}
    used |= {name: value for name, value in given.items() if value is not None}
    if not used.get("normalize"):
        raise UserError(f"{args.teacher}: expected a teacher with vectors of length 1; pass --normalize")
    for name in PREFIXES.values():
        setattr(args, name, used[name])
    config, tokenizer = load_config(args.teacher), load_tokenizer(args.teacher)
    tower = load_backbone(args.teacher, config, used["pooling"], 0).to(device).eval()
    precision = choose_precision("auto", device)
    encoders = {
        side: Encoder(
            tower, tokenizer, TextRules(args.max_seq_len, used[prefix], False), used["pooling"], True, device,
            precision, batch_size=512, tokens_per_batch=token_budget(0, device),
        )
        for side, prefix in PREFIXES.items()
    }  # fmt: skip
    source = [model_checksum(args.teacher), tokenizer_checksum(tokenizer), used, args.max_seq_len]
    return encoders, checksum_text(json.dumps(source, sort_keys=True))


def first_student(
    args: argparse.Namespace, teacher: Encoder, texts: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return --student, or the shrunk teacher."""
    if args.student:
        model = AutoModelForSequenceClassification.from_pretrained(
            args.student, dtype=torch.float32, trust_remote_code=False
        )
        return model, load_tokenizer(args.student)
    prefixes = list(dict.fromkeys(getattr(args, name) for name in PREFIXES.values()))
    tokenizer: Any = teacher.tokenizer
    embeddings = [[at] for at in range(teacher.tower.get_input_embeddings().weight.shape[0])]
    if args.vocab_size:
        segments = getattr(teacher.tower.config, "type_vocab_size", 1) > 1
        tokenizer, embeddings = shrink_tokenizer(
            tokenizer, texts[:COUNTED_TEXTS], args.vocab_size, prefixes, args.fold_characters, segments
        )
    chunks = [texts[at : at + SAMPLED_AT_ONCE] for at in range(0, SAMPLED_TEXTS, SAMPLED_AT_ONCE)]
    tables = [teacher.tokenize(chunk) for chunk in chunks if chunk]
    padded = [table.padded(range(len(table)), teacher.tokenizer.pad_token_id) for table in tables]
    inputs = [(torch.from_numpy(ids), torch.from_numpy(mask)) for ids, mask in padded]
    model = shrink_model(teacher.tower.cpu(), args.layers, args.neurons, embeddings, inputs)
    teacher.tower.to(teacher.device)  # where it encodes
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def write_folder(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> None:
    """Write the model in float16 with the files in which sentence-transformers keeps its settings."""
    transformers.logging.disable_progress_bar()
    with atomic_folder(folder) as place:
        model.half().save_pretrained(place)
        save_tokenizer(tokenizer, place)
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for at, (path, kind) in enumerate(kinds.items())
        ]
        (place / "modules.json").write_text(json.dumps(modules, indent=1) + "\n", encoding="utf-8")
        pooling = {"word_embedding_dimension": model.config.hidden_size, "pooling_mode_mean_tokens": True}
        write_json(place / "1_Pooling/config.json", pooling)
        prompts = {side: getattr(args, name) for side, name in PREFIXES.items()}
        write_json(
            place / "config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": "cosine"}
        )


def distill(args: argparse.Namespace) -> None:
    """Distill and write the folder."""
    device, work = choose_device(args.device), Path(f"{args.to}.work")
    if args.to.exists():
        raise UserError(f"{args.to}: already exists; delete it or pass another --to")
    set_threads(args.threads)
    with folder_lock(work):
        teacher, source = teacher_encoders(args, device)
        passages = read_passages(args.data_dir, args.passages, args.seed)
        questions = read_questions(args.data_dir)
        if args.questions:
            check_groups(questions, args.group_size)
        texts = make_texts(passages, questions, args.seed)
        log(f"{len(passages):,} passages, {len(texts.texts):,} texts, {len(questions):,} training questions")
        torch.manual_seed(args.seed)
        model, tokenizer = first_student(args, teacher["passage"], passages + [q.text for q in questions])
        size = sum(weight.numel() for weight in model.parameters())
        log(
            f"student: {size / 1e6:.1f} million parameters, {2 * size / 1e6:.1f} MB in float16; "
            f"a vocabulary of {len(tokenizer):,} tokens"
        )
        vectors = teacher_vectors(teacher, texts, work / "teacher", source)
        train(args, model, tokenizer, (texts, vectors, questions), device, work, source)
        write_folder(args.to, model.cpu(), tokenizer, args)
    words = ("--dual_params", "none", "--pretrained_model_path", args.to)
    log(f"wrote {args.to}; try it: {command('do_dual_infer.py', *words)}")


def train(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Any, np.ndarray, list[Question]],
    device: torch.device,
    work: Path,
    teacher: str,
) -> None:
    """Train the student, with checkpoints in `work`; `teacher`: its checksum, part of the stamp."""
    texts, vectors, questions = data
    asked = min(args.questions, len(questions))
    rules = {side: TextRules(args.max_seq_len, getattr(args, name), False) for side, name in PREFIXES.items()}
    batches = DistillationBatches(
        tokenizer, {**rules, "pair": TextRules(args.max_seq_len, "", False)}, texts, vectors, questions,
        min(args.documents, texts.documents), asked, args.group_size, args.window, args.seed,
    )  # fmt: skip
    head = [
        name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")
    ]
    student = CrossEncoder(model, head).to(device)
    precision = choose_precision("auto", device)
    chunking = Chunking(
        0, token_budget(0, device) if device.type == "cuda" else CPU_TOKENS, args.seed, device, precision
    )
    task = DistillationTask(student, batches, chunking, work / "params.bin", args.lr)
    options = TrainerOptions(
        epochs=-(-args.steps // task.batches_per_epoch), lr=args.lr, max_steps=args.steps, weight_decay=0.01,
        eval_every=-1, save_every_minutes=5, log_every=10,
    )  # fmt: skip
    given = {name: str(value) for name, value in vars(args).items() if name not in NOT_STAMPED}
    stamp = {**given, "teacher": teacher}
    Trainer(task, options, Processes(device), precision, work / "distill_checkpoint.pt", stamp).run()
