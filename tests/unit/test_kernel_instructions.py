"""The ways through machine code that `benchmarks.kernel_instructions` counts."""

import json

from benchmarks import kernel_instructions
from benchmarks.cubins import instructions, local_memory, registers
from benchmarks.kernel_times import BUILDS
from sere_dist.kernels.reroute import MAX_THREADS, SOURCE, compile_kernels
from tests.support.commands import invoke


def code(*lines: str) -> list[dict[str, str]]:
    """Instructions as nvdisasm writes them, from "@P0 BRA 0x20"."""
    found = []
    for line in lines:
        *predicate, opcode, operands = (line if " " in line else f"{line} ").split(" ")
        found.append({"opcode": opcode, "operands": operands} | ({"predicate": predicate[0]} if predicate else {}))
    return found


def test_shortest_and_longest_way():
    loop = code("MOV", "IADD", "@P0 BRA 0x10", "BAR.SYNC 0x0", "EXIT")
    assert kernel_instructions.ways(loop) == (5, 5), "a loop runs once"
    early_exit = code("@P0 EXIT ", "@P1 BRA 0x40", "MOV", "MOV", "BAR.SYNC 0x0", "EXIT")
    assert kernel_instructions.ways(early_exit) == (4, 6), "who leaves early passes no barrier"
    uniform = code("BRA UP0,0x30", "MOV", "MOV", "EXIT")
    assert kernel_instructions.ways(uniform) == (2, 4)
    apart = code("BRA.DIV UR4,0x30", "MOV", "EXIT", "MOV", "BRA 0x10")
    assert kernel_instructions.ways(apart) == (3, 3), "lanes that have come apart do not count"


def test_a_layer_does_not_pay_for_what_it_lacks(tmp_path):
    found = {}
    for name, build in BUILDS.items():
        cubin = compile_kernels("sm_90", build, tmp_path).code
        found[name] = len(instructions(cubin)["reroute"])
        assert all(count * MAX_THREADS <= 65536 for count in registers(cubin).values())
        assert not any(local_memory(cubin).values())
    assert list(found.values()) == sorted(set(found.values()))


def test_the_table_beside_another_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_instructions, "BUILDS", {"paper's policy": BUILDS["paper's policy"]})
    monkeypatch.setattr(kernel_instructions, "source_of", lambda source: SOURCE.read_text() + f"// {source}")
    results = tmp_path / "counts.json"
    shown = invoke(kernel_instructions.main, "--revision", "abc", "--results", str(results)).output
    assert "abc" in shown and "reroute_settle" in shown
    counts = json.loads(results.read_text())["counts"]
    assert [count["source"] for count in counts] == ["this"] * 3 + ["abc"] * 3
    assert [{**count, "source": "this"} for count in counts[3:]] == counts[:3]
