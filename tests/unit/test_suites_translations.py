# SPDX-License-Identifier: Apache-2.0
"""QEMU's trace of translations, read."""

from __future__ import annotations

from testbed.instruments.translations import Translation, parse_translations

TRACE = """\
vtd_dmar_translate dev 08:00.00 iova 0xfffe0000 -> gpa 0xfb010000 mask 0xfff
vtd_dmar_translate dev 08:00.00 iova 0xfffe0000 -> gpa 0xfb010000 mask 0xfff
vtd_dmar_fault sid 0x800 fault 5 addr 0xf9010000 write 1
vtd_dmar_translate dev 1a:1f.07 iova 0xf9000000 -> gpa 0xf9000000 mask 0x1fffff
"""


def test_each_page_once_with_its_size() -> None:
    small = Translation("0000:08:00.0", 0xFFFE0000, 0xFB010000)
    large = Translation("0000:1a:1f.7", 0xF9000000, 0xF9000000, 2 << 20)
    assert parse_translations(TRACE) == {small, large}
    assert large.is_identity
    assert not small.is_identity


def test_other_iommus_have_words_of_their_own() -> None:
    text = (
        "1@2:virtio_iommu_translate_out 0xfffe0010 -> 0xfb010010 for sid=2048\n"
        "1@2:virtio_iommu_translate_out 0xfffe0020 -> 0xfb010020 for sid=2048\n"
        "1@2:amdvi_translation_result devid: 1a:1f.7 gpa 0xf9000004 hpa 0xf9000000\n"
    )
    assert parse_translations(text) == {
        Translation("0000:08:00.0", 0xFFFE0000, 0xFB010000),
        Translation("0000:1a:1f.7", 0xF9000000, 0xF9000000),
    }
