"""Published weights for the backbones of this harness. None of the files was at hand: see `known_from`."""

from functools import partial

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

_openmind = partial(
    PublishedWeights,
    backbone="resenc",
    channels=1,
    spacing="1 x 1 x 1 mm",
    intensities="z-score of the whole cropped image: --set task.normalisation=zscore",
    corpus="OpenMind: public head MR of OpenNeuro (its number is in the paper)",
    licence="CC-BY-4.0",
    reference="Wald et al. 2024, arXiv:2412.17041",
)
_READ = "read: its page in a stored index; the file itself was not at hand"


def _checkpoint(repository: str) -> str:
    """The address of the checkpoint in a model repository."""
    return f"https://huggingface.co/{repository}/resolve/main/checkpoint_final.pth"


resencl_openmind_mae = _openmind(
    name="resencl_openmind_mae",
    description="ResEnc-L, masked autoencoder on OpenMind (nnssl's format)",
    page="huggingface.co/MIC-DKFZ/ResEncL-OpenMind-MAE",
    url=_checkpoint("MIC-DKFZ/ResEncL-OpenMind-MAE"),
    file="ResEncL-OpenMind-MAE.pth",
    sha256="7a847af785635335c00e711d16ff4d225d86ecd5992b14c059df2b520e3ee933",
    known_from="read: its page in a stored index, and the digest in two repositories of others; the file was not at hand",
)

resencl_openmind_vf = _openmind(
    name="resencl_openmind_vf",
    description="ResEnc-L, VolumeFusion on OpenMind (nnssl's format)",
    page="huggingface.co/MIC-DKFZ/ResEncL-OpenMind-VF",
    url=_checkpoint("MIC-DKFZ/ResEncL-OpenMind-VF"),
    file="ResEncL-OpenMind-VF.pth",
    known_from=_READ,
)

resencl_openmind_voco = _openmind(
    name="resencl_openmind_voco",
    description="ResEnc-L, VoCo on OpenMind (nnssl's format)",
    page="huggingface.co/MIC-DKFZ/ResEncL-OpenMind-VoCo",
    url=_checkpoint("MIC-DKFZ/ResEncL-OpenMind-VoCo"),
    file="ResEncL-OpenMind-VoCo.pth",
    known_from=_READ,
)

resencl_openmind_simclr = _openmind(
    name="resencl_openmind_simclr",
    description="ResEnc-L, SimCLR on OpenMind (nnssl's format)",
    page="huggingface.co/MIC-DKFZ/ResEncL-OpenMind-SimCLR",
    url=_checkpoint("MIC-DKFZ/ResEncL-OpenMind-SimCLR"),
    file="ResEncL-OpenMind-SimCLR.pth",
    known_from=_READ,
)

resencl_openmind_swinunetr = _openmind(
    name="resencl_openmind_swinunetr",
    description="ResEnc-L, the pretext tasks of Swin UNETR on OpenMind (nnssl's format)",
    page="huggingface.co/MIC-DKFZ/ResEncL-OpenMind-SwinUNETR",
    url=_checkpoint("MIC-DKFZ/ResEncL-OpenMind-SwinUNETR"),
    file="ResEncL-OpenMind-SwinUNETR.pth",
    known_from=_READ,
)
