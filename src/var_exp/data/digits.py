"""Real images with no download: the 1,797 handwritten digits that scikit-learn carries.

The test part of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI,
1998): 8x8 pixels, 17 grey levels, bright strokes on black. They are enlarged once, smoothly,
to a size that a multi-scale tokenizer has something to do with. The split is fixed: 1,437
digits to train on, 360 to validate, classes in proportion.
"""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from var_exp.configurable import Seed, checked
from var_exp.data.source import ImageSource, TensorImages, stratified_split

NUM_VAL = 360
WHITE = 16  # the brightest of the 17 levels


class Digits(ImageSource[Tensor]):
    """Handwritten digits, one channel, ten classes, not augmented.

    seed: of the split; leave it, or figures of different runs do not compare
    """

    @checked
    def __init__(self, name: str = "digits", image_size: int | Sequence[int] = 16, seed: Seed = 0):
        super().__init__(name, image_size, channels=1, class_names=[str(d) for d in range(10)])
        self.seed = seed

    def load(self) -> tuple[TensorImages, TensorImages]:
        digits = load_digits()
        images = torch.from_numpy(digits.images)[:, None] / WHITE  #    (N, 1, 8, 8)
        images = interpolate(images, self.image_size, mode="bilinear")  # (N, 1, H, W)
        images = images.clamp(0, 1).mul(255).round().to(torch.uint8)
        labels = torch.from_numpy(digits.target)
        train, val = stratified_split(digits.target, NUM_VAL, self.seed)
        return TensorImages(images[train], labels[train]), TensorImages(images[val], labels[val])
