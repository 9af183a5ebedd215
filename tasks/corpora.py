"""The four CT corpora of generic pre-training in the HybridMIM paper (section IV-A), in the layout as unpacked."""

from functools import partial

from harness import Corpus, Window

# HU; the pre-training window of the released code, since the paper states none.
WHOLE_CT = Window(-1000, 1000)
# mm; the spacing of the paper's CT tasks, for all corpora, so that one pre-training serves all these tasks.
SPACING = (1.5, 1.5, 2.0)

_ct = partial(Corpus, version="1", channels=("CT",), spacing=SPACING, normalisation=WHOLE_CT)

atm22 = _ct(
    name="atm22",
    description="ATM'22: chest CT, 300 training cases, of which the paper took 150",
    licence="as stated at registration",
    reference="Zhang et al. 2023, Multi-site, multi-domain airway tree modeling, Med. Image Anal. 90:102957",
    registration="atm22.grand-challenge.org",
    folders=("ATM22", "atm22"),
    patterns=("imagesTr/ATM_*", "*/imagesTr/ATM_*", "imagesVal/ATM_*", "*/imagesVal/ATM_*"),
    layout="ATM22/TrainBatch1/imagesTr/ATM_NNN_0000.nii.gz",
    phantom="TrainBatch1/imagesTr/ATM_{:03d}_0000.nii.gz",
)

luna16 = _ct(
    name="luna16",
    description="LUNA16: lung CT, 888 cases",
    licence="CC-BY 4.0",
    reference="Setio et al. 2017, Med. Image Anal. 42:1-13",
    registration="luna16.grand-challenge.org",
    folders=("LUNA16", "luna16"),
    patterns=("subset[0-9]/*.mhd", "subset[0-9]/subset[0-9]/*.mhd"),
    layout="LUNA16/subset0/UID.mhd with UID.raw beside it, to subset9",
    phantom="subset0/1.3.6.1.4.1.14519.5.2.1.6279.6001.{:03d}.mhd",
)

covid19_20 = _ct(
    name="covid19_20",
    description="COVID-19-20: chest CT with COVID-19 lesions",
    licence="as stated at registration",
    reference="Roth et al. 2022, Med. Image Anal. 82:102605",
    registration="covid-segmentation.grand-challenge.org",
    folders=("COVID-19-20_v2", "COVID-19-20", "covid19_20"),
    patterns=("volume-covid19-A-*_ct.nii*", "*/volume-covid19-A-*_ct.nii*"),
    layout="COVID-19-20_v2/Train/volume-covid19-A-NNNN_ct.nii.gz (the _seg files are not read)",
    phantom="Train/volume-covid19-A-{:04d}_ct.nii.gz",
)

flare21 = _ct(
    name="flare21",
    description="FLARE21: abdominal CT, 361 training and 50 validation cases",
    licence="as stated at registration",
    reference="Ma et al. 2022, Fast and low-GPU-memory abdomen CT organ segmentation, Med. Image Anal. 82:102616",
    registration="flare.grand-challenge.org",
    folders=("FLARE21", "flare21"),
    patterns=("TrainingImg/*", "ValidationImg/*"),
    layout="FLARE21/TrainingImg/train_NNN_0000.nii.gz and ValidationImg/validation_NNN_0000.nii.gz",
    phantom="TrainingImg/train_{:03d}_0000.nii.gz",
)
