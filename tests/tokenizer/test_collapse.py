"""For each switch against collapse a toy that collapses without it and is mended with it.

A collapse is seen in the perplexity of the codes in use, 1 to V; that of the coarse scales in
what is reconstructed from them alone.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from var_exp.tokenizer import Codebook, EMACodebook, MultiScaleQuantizer

V = 16


def in_use(indices: torch.Tensor) -> float:
    """Perplexity of the codes (...)."""
    share = torch.bincount(indices.flatten(), minlength=V) / indices.numel()
    return torch.special.entr(share).sum().exp().item()


def far_clusters() -> torch.Tensor:
    """512 vectors in 16 clusters, none of them where codes are drawn."""
    means = 5 + 2 * torch.randn(V, 4)
    return means[torch.randint(0, V, (512,))] + 0.05 * torch.randn(512, 4)


def learn(codebook: Codebook, data: torch.Tensor, steps: int, lr: float = 1e-2, drift: float = 0):
    """Perplexity on all the data after training on batches of it, which drift at each step."""
    codebook.start(data)
    learned = [parameter for parameter in codebook.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned or [torch.zeros(1, requires_grad=True)], lr)
    for step in range(steps):
        batch = data[torch.randint(0, len(data), (128,))] + drift * step
        indices = codebook.nearest(batch)
        optimizer.zero_grad()
        if learned:
            F.mse_loss(codebook.lookup(indices), batch).backward()
        codebook.update(batch, indices)
        optimizer.step()
    return in_use(codebook.nearest(data + drift * steps))


@pytest.mark.parametrize("start_from", ["data", "kmeans"])
def test_a_start_where_the_data_are_mends_codes_that_are_drawn_far_away(start_from):
    data = far_clusters()
    assert learn(Codebook(V, 4), data, steps=100) < 5
    assert learn(Codebook(V, 4, start_from=start_from), data, steps=100) > 9


@pytest.mark.parametrize("book", [Codebook, EMACodebook])
def test_restarts_mend_codes_that_nobody_chooses(book):
    data, choices = far_clusters(), {"start_from": "none", "decay": 0.9}
    assert learn(book(V, 4, restart_below=0.0, **choices), data, steps=150) < 5
    assert learn(book(V, 4, restart_below=0.03, **choices), data, steps=150) > 9


def test_moving_averages_keep_up_with_features_that_codes_learned_by_gradient_lose():
    data, choices = torch.randn(512, 4), {"start_from": "data", "restart_below": 0.0}
    moving = {"steps": 300, "lr": 1e-3, "drift": 0.02}
    assert learn(Codebook(V, 4, **choices), data, **moving) < 5
    assert learn(EMACodebook(V, 4, decay=0.9, **choices), data, **moving) > 8


def test_cosine_codes_mend_features_that_are_much_shorter_than_the_codes():
    """By distance the shortest code is the nearest of all."""
    data = 0.05 * F.normalize(torch.randn(512, 16), dim=1)
    assert learn(Codebook(V, 16), data, steps=50) < 3
    assert learn(Codebook(V, 16, cosine=True), data, steps=50) > 12


def test_the_entropy_term_leads_all_codes_to_the_data():
    def codes_in_use(entropy):
        choices = {"phi_ratio": 0.0, "entropy": entropy, "entropy_temperature": 2.0}
        quantizer = MultiScaleQuantizer([1], Codebook(V, 4), **choices).train()
        with torch.no_grad():
            quantizer.codebook(0).weight.mul_(0.2).add_(3)  # on one side of the data
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=3e-2)
        for _ in range(150):
            optimizer.zero_grad()
            quantizer(data[torch.randint(0, 512, (128,))]).loss.backward()
            optimizer.step()
        return in_use(quantizer.encode(data)[0])

    data = torch.randn(512, 4, 1, 1)
    assert codes_in_use(entropy=0.0) < 3
    assert codes_in_use(entropy=1.0) > 8


def test_scale_drop_makes_the_coarse_scale_carry_what_it_can():
    """Of vectors that 16 codes can tell apart, by an encoder that starts with nothing coarse."""
    means = torch.randn(V, 4) @ torch.randn(4, 16) / 2
    data = means[torch.randint(0, V, (512,))] + 0.3 * torch.randn(512, 16)

    def unexplained(quantizer_dropout):
        """Share of the variance that reconstructions from each prefix of the scales miss."""
        encoder, decoder = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            for parameter in encoder.parameters():
                places = parameter.view(4, 4, -1)  # (D, 2 * 2, ...)
                places -= places.mean(dim=1, keepdim=True)
        choices = {"per_scale": True, "phi_ratio": 0.0, "quantizer_dropout": quantizer_dropout}
        quantizer = MultiScaleQuantizer([1, 2], EMACodebook(V, 4), **choices).train()
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
        for _ in range(200):
            batch = data[torch.randint(0, 512, (64,))]
            output = quantizer(encoder(batch).view(-1, 4, 2, 2))
            loss = F.mse_loss(decoder(output.f_hat.flatten(1)), batch) + 0.1 * output.loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            sums = quantizer.partial_sums(quantizer.encode(encoder(data).view(-1, 4, 2, 2)))
            errors = [F.mse_loss(decoder(f_hat.flatten(1)), data) for f_hat in sums]
        return [error.item() / data.var(dim=0).mean().item() for error in errors]

    without, mended = unexplained(quantizer_dropout=0.0), unexplained(quantizer_dropout=0.5)
    assert without[0] > 0.5 and mended[0] < 0.4
    assert max(without[1], mended[1]) < 0.25  # from all scales both can be had
