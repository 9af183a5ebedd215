"""Published weights for the backbones of this harness. None of the files was at hand: see `known_from`."""

from harness import PublishedWeights

models_genesis_chest_ct = PublishedWeights(
    name="models_genesis_chest_ct",
    description="Models Genesis: 3D U-Net, restored from distorted crops of chest CT",
    backbone="genesis_unet3d",
    channels=1,
    spacing="each scan's own",
    intensities="CT, -1000 to 1000 HU mapped to 0..1",
    corpus="LUNA16",
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
    description="MONAI's Swin encoder: inpainting, rotation and contrast on CT",
    backbone="swinunetr",
    settings={"feature_size": "48"},
    channels=1,
    spacing="1.5 x 1.5 x 2.0 mm",
    intensities="CT, -1000 to 1000 HU mapped to 0..1",
    corpus="CT scans of public data sets, which its paper names",
    licence="not read: see its page",
    reference="Tang et al. 2022, arXiv:2111.14791",
    page="github.com/Project-MONAI/research-contributions, SwinUNETR/Pretrain",
    url="https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/model_swinvit.pt",
    file="model_swinvit.pt",
    known_from="read: the repository's README, which has the address, and its loading example",
)


def _openmind(task: str, name: str, sha256: str = "") -> PublishedWeights:
    """ResEnc-L, pre-trained on OpenMind by `task`, in nnssl's format. `name`: the end of its model page's name."""
    page = f"MIC-DKFZ/ResEncL-OpenMind-{name}"
    digest = ", and the digest in repositories of others" if sha256 else ""
    return PublishedWeights(
        name=f"resencl_openmind_{name.lower()}",
        description=f"ResEnc-L, {task} on OpenMind (nnssl's format)",
        backbone="resenc",
        channels=1,
        spacing="1 x 1 x 1 mm",
        intensities="z-score of the whole cropped image: --set task.normalisation=zscore",
        corpus="OpenMind: public head MR of OpenNeuro (its number is in the paper)",
        licence="CC-BY-4.0",
        reference="Wald et al. 2024, arXiv:2412.17041",
        page=f"huggingface.co/{page}",
        url=f"https://huggingface.co/{page}/resolve/main/checkpoint_final.pth",
        file=f"ResEncL-OpenMind-{name}.pth",
        sha256=sha256,
        known_from=f"read: its page in a stored index{digest}; the file was not at hand",
    )


resencl_openmind_mae = _openmind(
    "masked autoencoder", "MAE", "7a847af785635335c00e711d16ff4d225d86ecd5992b14c059df2b520e3ee933"
)
resencl_openmind_vf = _openmind("VolumeFusion", "VF")
resencl_openmind_voco = _openmind("VoCo", "VoCo")
resencl_openmind_simclr = _openmind("SimCLR", "SimCLR")
resencl_openmind_swinunetr = _openmind("the pretext tasks of Swin UNETR", "SwinUNETR")
