"""Text headers: none leads out of its folder, none crashes its reader."""

import os

import pytest

from harness import UserError
from harness.data.image_files import read_header, read_image


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "x.mhd",
            b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = ../../secret.raw\n",
            "",
        ),
        ("x.mhd", b"NDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = LIST\na.raw\n", ""),
        ("x.mhd", b"NDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = a%02d.raw 1 4 1\n", ""),
        ("x.nhdr", b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\ndata file: /etc/passwd\n", ""),
        ("x.nrrd", b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n\nshort", "cannot be read"),
        ("x.mha", b"garbage", "cannot be read"),
        (
            "x.nrrd",
            b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 40000 40000 40000\nencoding: gzip\n\n",
            "its header claims",
        ),
    ],
)
def test_text_headers_lead_nowhere_else(name, text, says, tmp_path):

    path = tmp_path / "folder" / name
    path.parent.mkdir()
    path.write_bytes(text)
    (tmp_path / "secret.raw").write_bytes(bytes(64))
    with pytest.raises(UserError, match=says or "only a single file beside the header is read"):
        read_image(path)


MHA = """ObjectType = Image
NDims = 3
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = 1 1 1
DimSize = 4 4 4
ElementType = MET_UCHAR
ElementDataFile = LOCAL
"""


NRRD = """NRRD0004
type: uchar
dimension: 3
space: left-posterior-superior
sizes: 4 4 4
space directions: (1,0,0) (0,1,0) (0,0,1)
kinds: domain domain domain
encoding: raw
space origin: (0,0,0)

"""


@pytest.mark.parametrize(
    ("text", "before", "after", "says"),
    [
        (MHA, "NDims = 3", "NDims = -1", "'-1' dimensions"),
        (MHA, "NDims = 3", "NDims = 1000", "'1000' dimensions"),
        (MHA, "NDims = 3", "NDims = 3\nNDims = 1000", "'1000' dimensions"),
        (MHA, "NDims = 3", "NDims =\n1000", "'' dimensions"),
        (MHA, "NDims = 3", "ElementDataFileX = a\nNDims = 1000", "'1000' dimensions"),
        (MHA, "NDims = 3", "ElementSize = 1 1 1\rNDims = 1000", "a line that is no field"),
        (MHA, "ObjectType", "NRRD0004\n\nNDims = 1000\nObjectType", "a line that is no field"),
        (MHA, "1 0 0 0 1 0", "1 0 0 0 1 1e308", "not within 1e[+]06 mm, 'TransformMatrix"),
        (MHA, "Offset = 0", "Position = inf", "not within 1e[+]06 mm, 'Position"),
        (MHA, "Spacing = 1", "Spacing = 0x1p1023", "not within 1e[+]06 mm, 'ElementSpacing"),
        (NRRD, "kinds: domain", "kinds: " + "a" * 1000, "a line of 1021 bytes"),
        (NRRD, "kinds", "a" * 1000 + ": a\nkinds", "a line of 1003 bytes"),
        (NRRD, "kinds", "content:" + "a" * 1000 + "\nkinds", "a line of 1008 bytes"),
        (NRRD, "dimension: 3", "dimension: 17", "'17' dimensions"),
        (NRRD, "(1,0,0)", "(1e308,0,0)", "not within 1e[+]06 mm, 'space directions"),
        (NRRD, "encoding: raw", "encoding: gzip\nbyte skip: -1", "its byte skip is negative"),
    ],
)
def test_text_headers_that_crash_their_reader_are_refused(text, before, after, says, tmp_path):

    assert before in text
    path = tmp_path / ("x.nrrd" if text is NRRD else "x.mha")
    path.write_bytes(text.replace(before, after, 1).encode() + bytes(64))
    with pytest.raises(UserError, match=says):
        read_header(path)


@pytest.mark.parametrize("line", ["content: ", "a:=", "0008|0005:=", "# "])
def test_long_lines_that_nrrd_keeps_tags_and_other_line_ends_are_read(line, tmp_path):

    (tmp_path / "x.nrrd").write_bytes(NRRD.replace("kinds", f"{line}{'a' * 5000}\nkinds").encode() + bytes(64))
    tagged = MHA.replace("DimSize", "0008|0005 = ISO_IR 100\nITK_InputFilterName = a: b = c\nDimSize")
    (tmp_path / "x.mha").write_bytes(tagged.replace("\n", "\r\n").encode() + bytes(64))
    assert read_image(tmp_path / "x.nrrd")[0].shape == read_image(tmp_path / "x.mha")[0].shape == (4, 4, 4)


MHD = b"NDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("padded.mhd", b"Comment = " + b"x" * 200_000 + b"\n" + MHD + b"ElementDataFile = ../outside.raw\n"),
        ("blank.mhd", MHD + b"   ElementDataFile = ../outside.raw\n"),
        ("colon.mhd", MHD + b"ElementDataFile: ../outside.raw\n"),
        (
            "padded.nhdr",
            b"NRRD0004\n"
            + b"# x\n" * 60_000
            + b"type: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\ndata file: ../outside.raw\n",
        ),
        ("endless.mhd", b"Comment = " + b"x" * 3_000_000),
    ],
)
def test_no_header_leads_out_of_its_folder(name, text, tmp_path):
    (tmp_path / "outside.raw").write_bytes(bytes(range(64)))
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / name
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"only a single file beside|longer than 1 MiB"):
        read_image(path)


def test_a_pipe_in_the_place_of_voxels_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.raw")
    (tmp_path / "x.mhd").write_bytes(MHD + b"ElementDataFile = x.raw\n")
    with pytest.raises(UserError, match="is no regular file"):
        read_image(tmp_path / "x.mhd")
