"""Published weights for the backbones of this harness. None of the files was at hand: see `known_from`."""

from harness import PublishedWeights

models_genesis_chest_ct = PublishedWeights(
    name="models_genesis_chest_ct",
    description="Models Genesis: 3D U-Net, restored from distorted crops of chest CT",
    backbone="genesis_unet3d",
    channels=1,
    spacing="each scan's own",
    intensities="CT, -1000 to 1000 HU mapped to 0..1",
    corpus="623 scans of LUNA16",
    licence="not read: see its page",
    reference="Zhou et al. 2021, doi:10.1016/j.media.2020.101840",
    page="github.com/MrGiovanni/ModelsGenesis",
    file="Genesis_Chest_CT.pt",
    known_from="read: the paper, the repository's network and loading example",
)

transvw_chest_ct = PublishedWeights(
    name="transvw_chest_ct",
    description="TransVW: 3D U-Net, trained to classify and restore visual words of chest CT",
    backbone="genesis_unet3d",
    channels=1,
    spacing="each scan's own",
    intensities="CT, -1000 to 1000 HU mapped to 0..1",
    corpus="623 scans of LUNA16",
    licence="not read: see its page",
    reference="Haghighi et al. 2021, doi:10.1109/TMI.2021.3060634",
    page="github.com/fhaghighi/TransVW",
    file="TransVW_chest_ct.pt",
    known_from="read: the paper, the repository's network and loading example",
)

swinunetr_ssl_ct = PublishedWeights(
    name="swinunetr_ssl_ct",
    description="MONAI's Swin encoder: inpainting, rotation and contrast on CT of five data sets",
    backbone="swinunetr",
    settings={"feature_size": "48"},
    channels=1,
    spacing="1.5 x 1.5 x 2.0 mm",
    intensities="CT, -1000 to 1000 HU mapped to 0..1",
    corpus="5,050 CT scans of five public data sets",
    licence="not read: see its page",
    reference="Tang et al. 2022, arXiv:2111.14791",
    page="github.com/Project-MONAI/research-contributions, SwinUNETR/Pretrain",
    url="https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/model_swinvit.pt",
    file="model_swinvit.pt",
    known_from="read: the paper, the repository's README and loading example",
)
