"""ONNX Runtime: the decoder as a graph of its fused operations, with weights of 8 bits in groups of 32.

The graph is what the runtime's own generator makes of such a model: `MatMulNBits` with integer products,
`GroupQueryAttention` with a cache that is written in place. It reads embeddings. Needs `pip install --no-deps onnx
onnxruntime ml_dtypes flatbuffers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvila.modeling import NVILAForConditionalGeneration

_GROUP = 32
_MICROSOFT = "com.microsoft"


class OnnxRuntime:
    """A session and its cache.

    Args:
        model: The model; its language model is a Llama without biases.
        threads: Threads of an operation.
        room: Positions of the cache.
    """

    def __init__(self, model: NVILAForConditionalGeneration, *, threads: int, room: int = 2048) -> None:
        import onnxruntime

        config: Any = model.config.text_config
        self._layers, self._room = config.num_hidden_layers, room
        embedding: Any = model.get_input_embeddings()
        self._embed = embedding.weight.detach().float().numpy()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        graph = _Graph(model, room).build()
        self._session = onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])
        width = config.hidden_size // config.num_attention_heads
        empty = np.zeros((1, config.num_key_value_heads, room, width), np.float32)
        self._value: Any = onnxruntime.OrtValue.ortvalue_from_numpy
        self._cache = [self._value(empty.copy()) for _ in range(2 * self._layers)]
        self._at = 0

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Forget everything, read a prompt and return its next token."""
        self._at = 0
        return [int(self._run(prompts[0])[-1].argmax())]

    def step(self, tokens: Sequence[int]) -> list[int]:
        """Add a token and return the next one."""
        return [int(self._run(tokens)[-1].argmax())]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits of every position of a text."""
        self._at = 0
        return torch.from_numpy(self._run(ids, every=True))

    def close(self) -> None:
        """Free the peer's memory."""
        del self._session
        self._cache.clear()

    def _run(self, ids: Sequence[int], *, every: bool = False) -> Any:
        binding = self._session.io_binding()
        rows = np.arange(len(ids)) if every else np.array([len(ids) - 1])
        self._at += len(ids)
        given = {
            "embeds": self._embed[list(ids)][None],
            "last": np.array([self._at - 1], np.int32),
            "total": np.array(self._at, np.int32),
            "rows": rows.astype(np.int64),
        }
        for name, value in given.items():
            binding.bind_ortvalue_input(name, self._value(np.ascontiguousarray(value)))
        for number, one in enumerate(self._cache):
            binding.bind_ortvalue_input(f"past{number}", one)
            binding.bind_ortvalue_output(f"present{number}", one)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()[0]


class _Graph:
    """Builds the graph."""

    def __init__(self, model: NVILAForConditionalGeneration, room: int) -> None:
        self._model, self._room = model, room
        self._config: Any = model.config.text_config
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def build(self) -> Any:
        """Return the model."""
        from onnx import TensorProto, helper

        config, decoder = self._config, self._model.model.language_model
        float_, width = TensorProto.FLOAT, config.hidden_size // config.num_attention_heads
        self._rotary(decoder, width)
        x = "embeds"
        for number, layer in enumerate(decoder.layers):
            x = self._layer(number, layer, x)
        x = self._norm(decoder.norm.weight, x)
        self._nodes.append(helper.make_node("Gather", [x, "rows"], ["picked"], axis=1))
        self._product(self._model.lm_head.weight, "picked", "logits")
        shape = [1, config.num_key_value_heads, self._room, width]
        names = range(2 * config.num_hidden_layers)
        info = helper.make_tensor_value_info
        given = [
            info("embeds", float_, [1, "tokens", config.hidden_size]),
            info("last", TensorProto.INT32, [1]),
            info("total", TensorProto.INT32, []),
            info("rows", TensorProto.INT64, ["picked"]),
            *(info(f"past{number}", float_, shape) for number in names),
        ]
        made = [*(info(f"present{number}", float_, shape) for number in names)]
        made.append(info("logits", float_, [1, "picked", config.vocab_size]))
        graph = helper.make_graph(self._nodes, "decoder", given, made, self._weights)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _rotary(self, decoder: Any, width: int) -> None:
        places = torch.arange(self._room)[None]
        cos, sin = decoder.rotary_emb(torch.zeros(1, 1, 1), places)
        self._tensor("cos", cos[0, :, : width // 2].float().numpy())
        self._tensor("sin", sin[0, :, : width // 2].float().numpy())

    def _layer(self, number: int, layer: Any, x: str) -> str:
        from onnx import helper

        config, attention, mlp = self._config, layer.self_attn, layer.mlp
        joined = torch.cat([one.weight for one in (attention.q_proj, attention.k_proj, attention.v_proj)])
        qkv = self._product(joined, self._norm(layer.input_layernorm.weight, x))
        past = [f"{{}}{2 * number + one}" for one in (0, 1)]
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [qkv, "", "", *(name.format("past") for name in past), "last", "total", "cos", "sin"],
                [f"attended{number}", *(name.format("present") for name in past)],
                domain=_MICROSOFT,
                num_heads=config.num_attention_heads,
                kv_num_heads=config.num_key_value_heads,
                do_rotary=1,
            )
        )
        x = self._add(x, self._product(attention.o_proj.weight, f"attended{number}"))
        normed = self._norm(layer.post_attention_layernorm.weight, x)
        gate, up = (self._product(one.weight, normed) for one in (mlp.gate_proj, mlp.up_proj))
        squashed = self._node("Sigmoid", [gate])
        inner = self._node("Mul", [self._node("Mul", [gate, squashed]), up])
        return self._add(x, self._product(mlp.down_proj.weight, inner))

    def _norm(self, weight: Tensor, x: str) -> str:
        name = self._tensor(f"norm{len(self._weights)}", weight.detach().float().numpy())
        return self._node("SimplifiedLayerNormalization", [x, name], axis=-1, epsilon=self._config.rms_norm_eps)

    def _product(self, weight: Tensor, x: str, out: str = "") -> str:
        outputs, inputs = weight.shape
        groups = weight.detach().float().view(outputs, -1, _GROUP)
        scales = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        values = ((groups / scales).round() + 128).to(torch.uint8)
        number = len(self._weights)
        return self._node(
            "MatMulNBits",
            [
                x,
                self._tensor(f"weight{number}", values.numpy()),
                self._tensor(f"scale{number}", scales[..., 0].contiguous().numpy()),
            ],
            out,
            domain=_MICROSOFT,
            K=inputs,
            N=outputs,
            bits=8,
            block_size=_GROUP,
            accuracy_level=4,
        )

    def _add(self, first: str, second: str) -> str:
        return self._node("Add", [first, second])

    def _node(self, kind: str, inputs: list[str], out: str = "", **attributes: Any) -> str:
        from onnx import helper

        out = out or f"value{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    def _tensor(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self._weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name
