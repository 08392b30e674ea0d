"""Identifies the architecture that a run's code implements.

Export claims that a run is, say, a LlamaForCausalLM only if the tests have compared its code with that class:
an edited model.py may compute another function with the same names and shapes.
"""

import sys
from pathlib import Path

from lab import stages
from lab.errors import UserError, shown
from lab.storage import edits

# Hashes of the versions of each stage's code that passed tests/test_deploy.py; the current version is last.
TESTED = {
    "stage0_gpt": ["b6859e18dada65f7", "70e17819d98b21b8", "8d4d3c76827a3b03"],
    "stage1_rmsnorm": ["42d85f497ee343c1", "b96a884c5af26853", "23f05ca49985e116"],
    "stage2_rope": ["e43b2fe24f5c64af", "ee992e2241dbbd01", "f2555496b0fca65e", "9a42e22ed961c9ea"],
    "stage3_swiglu": ["427d956fa0256f21", "5874bb5111c522ef", "bca84c0b37df8b83", "3d024d1cb7922110"],
    "stage4_gqa": ["98cec680aeddf217", "9672e922e4e1cbea", "31d037c8293b41e6", "d8df1550b94fb9a3"],
    "stage5_flash": [
        "4b419d24f1138b36",
        "ba32b63848d291db",
        "543f7cb7661a57f3",
        "981644dee4fa8042",
        "f625ee391e0a4dcf",
        "8be243485afe3794",
        "2521b025f20db3db",
    ],
    "stage6_moe": [
        "b00ddca57954ea76",
        "ce212cd68b8b57c3",
        "44c68240be6ffa10",
        "30363564f5ff3420",
        "9666cf90e6b27c1e",
        "9c03ee98a849d3d4",
        "9b66522031b89a1e",
        "6ebadca682f27c87",
    ],
    "stage7a_mla": [
        "febbc8e72e7f281b",
        "6f3affb2a10b7105",
        "95efff67c892735a",
        "bf68a85477eb51c1",
        "19737922fffc9857",
    ],
    "stage7_mla_mtp": [
        "e276b1e6b2bb1cb1",
        "937b765de4d8c432",
        "d2396f69cd1d0369",
        "7ac72e4339847057",
        "645ac9dfd1c365f3",
        "588e1456bf5ef0f4",
        "a55b4ab3426464f1",
        "e2df08be33a4bf66",
    ],
    "deepseek_v2": ["8dd60cf586bec947", "eafe26da9530ab04", "94ee2513e99bde09"],
    "deepseek_v3": [
        "6ff93438f1444348",
        "e94fff99cafa405c",
        "b6f65b6741857445",
        "68fece1ae2eb0af2",
        "b3089054a163a174",
    ],
    "gpt_neox": ["7956a756487af5b4", "68364800cd8f263e", "f4c846b972c56e15"],
    "llama3": ["62d4dd124db0b669", "c9116c4d8cbb5b81", "989fb1f1b69034ab", "6d22e7522de609fe"],
    "mistral": ["4a415d36738875a1", "3d8e86a8e28b6dda", "c114359a64f57064", "3ce8032983c5fd1a"],
    "qwen2": ["0b3566070af75b1e", "7757f2b3fb3916a6", "d3550f8273da973f", "fa911a875a4f9a9f"],
    "qwen3": ["1e25f831707d0ed1", "ea08f9479411171b", "faaee529322ff1e7", "158f8c2243006ef7"],
    "qwen3_moe": ["3e2e06d556947e11", "6e6359d173cb2406", "a9da6747427c99a4"],
}


def of_run(run: Path, config: dict) -> str:
    """The stage of the course whose code a run was trained with, whatever the stage's folder was called.

    A run that records no hash is assumed to use the current code. Raises UserError if the code is no stage's.
    """
    hashes = edits.trained_with(config)
    if None in hashes:
        hashes = {edits.code_hash(config["stage"])}
    for stage, tested in TESTED.items():
        if hashes <= set(tested):
            return stage
    file = shown(stages.path(config["stage"]))
    raise UserError(
        f"{shown(run)} was trained with an edited {file}: no other program can run it\n"
        "export a run of an unedited stage, or write an exporter for your model"
    )


def warn_if_edited(stage: str) -> None:
    """Warns on stderr if a stage's current code is not the code that the tests compared with transformers."""
    if edits.code_hash(stage) not in TESTED[stage]:
        print(
            f"warning: {shown(stages.path(stage))} was edited: the imported weights may not fit it",
            file=sys.stderr,
        )
