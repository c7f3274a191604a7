"""The fused loss of a student sharded by FSDP2, beside that of its logits.

torchrun --nproc_per_node 2 -m tests.distributed.sharded OUTPUT
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_dkd import dkd_loss
from hf_dkd.language_head import language_head
from hf_dkd.losses.fused_linear import LinearHead, fused_rows
from hf_dkd.losses.row_pass import Weights


def model(seed: int, tied: bool) -> Any:
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, initializer_range=0.3, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def step(tied: bool, fused: bool) -> dict[str, Tensor]:
    """The loss of this process's two rows of tokens, and the gradients averaged over both processes."""
    mesh = init_device_mesh("cpu", (2,))
    student, teacher = model(0, tied), model(1, False)
    for part in (*student.model.layers, student):
        fully_shard(part, mesh=mesh)
    ids = torch.randint(64, (4, 7), generator=torch.Generator().manual_seed(0))[2 * dist.get_rank() :][:2]
    labels = pad(ids[:, 1:], (0, 1), value=-100).flatten()
    with torch.no_grad():
        of_teacher = teacher.model(ids).last_hidden_state.flatten(0, 1)
    losses: list[Tensor] = []
    if fused:
        head = language_head(student)
        assert head is not None

        def at_the_head(hidden: Tensor) -> None:
            pair = head.weights(), LinearHead(teacher.lm_head.weight)
            loss, _ = fused_rows(hidden.flatten(0, 1), pair[0], of_teacher, pair[1], labels, Weights(1.0, 2.0, 1.0))
            losses.append(loss)

        with head.handing_over(at_the_head):
            student(input_ids=ids)
    else:
        logits = student(input_ids=ids).logits.flatten(0, 1)
        losses.append(dkd_loss(logits, teacher.lm_head(of_teacher), labels, beta=2.0, reduction="sum"))
    losses[0].backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in student.named_parameters()}
    return {"loss": losses[0].detach(), **gradients}


def main() -> None:
    dist.init_process_group("gloo")
    results = {f"{tied} {fused}": step(tied, fused) for tied in (False, True) for fused in (False, True)}
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
