from harness.conformance.suite import assert_conforms


def test_denoise_keeps_the_contract():
    assert_conforms("denoise", backbones=["unet"])
