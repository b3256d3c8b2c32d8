import torch

from mmdlm.commands.main import main
from mmdlm.decoding import aux_network
from mmdlm.decoding.commits.learn2pd import KIND, Filter


def test_a_filter_is_trained_from_a_file_of_prompts(tmp_path, capsys) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "filter.safetensors"
    words = ("circle", "square", "star", "red", "blue", "green", "large", "small")
    prompts.write_text("".join(f"what colour is the {word} ?\n\n" for word in words))
    args = ["filter", str(prompts), "--out", str(out), "--length", "4", "--block", "4"]
    assert main(args) == 0
    assert "of what it accepts is final" in capsys.readouterr().out
    network = aux_network.load(out, KIND, Filter)
    assert network(torch.ones(1, 4)).shape == (1, 4)
    prompts.write_text("what is this ?\n")
    assert main(args) == 2
    assert "1 prompts, expected at least 3" in capsys.readouterr().err
