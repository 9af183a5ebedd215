"""What batchgeneratorsv2 makes of an image with given parameters; run by the Python of an environment that has nnU-Net.

    python batchgenerators_steps.py CASE.pt OUT.pt

CASE.pt has `image` (1, x, y, z), `larger` and `label` (1, X, Y, Z), a `matrix` and the `size` of the crop.
"""

import sys

import torch
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import blur_dimension
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform, _convert_my_grid_to_grid_sample_grid


def main() -> None:
    """Write the results by the names of our functions."""
    case = torch.load(sys.argv[1], weights_only=True)
    image, first, yes = case["image"], torch.tensor([0]), torch.tensor([True])
    made = {}
    for inverted in (False, True):
        transform = GammaTransform((0.7, 1.5), float(inverted), False, 1, 1)
        made[f"gamma {inverted}"] = transform._apply_to_image(
            image.clone(),
            apply_to_channel=first,
            retain_stats=yes,
            invert_image=torch.tensor([inverted]),
            gamma=torch.tensor([0.8]),
        )
    contrast = ContrastTransform((0.75, 1.25), True, False)
    made["contrast"] = contrast._apply_to_image(image.clone(), apply_to_channel=first, multipliers=torch.tensor([0.8]))
    low = SimulateLowResolutionTransform((0.5, 1), False, True, None)
    made["resolution"] = low._apply_to_image(image.clone(), apply_to_channel=first, scales=torch.full((1, 3), 0.6))
    blurred = image.clone()
    for axis, sigma in enumerate((0.5, 0.75, 1.0)):
        blurred = blur_dimension(blurred, sigma, axis)
    made["blur"] = blurred
    spatial = SpatialTransform(case["size"], 0, False, border_mode_seg="constant", padding_value_seg=-1)
    larger = case["larger"]
    grid = torch.matmul(spatial._get_base_grid_clone(), case["matrix"].T.float())
    parameters = {"grid": _convert_my_grid_to_grid_sample_grid(grid, larger.shape[1:])}
    made["warp"] = spatial._apply_to_image(larger.clone(), **parameters)
    made["label"] = spatial._apply_to_segmentation(case["label"], **parameters)
    torch.save(made, sys.argv[2])


if __name__ == "__main__":
    main()
