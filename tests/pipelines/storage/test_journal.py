"""The journal of a conversion, torn and spoiled."""

import pytest

from pipelines.storage.convert.journal import Journal


@pytest.mark.parametrize("cut", range(1, 120, 7))
def test_torn_journals_give_whole_blocks(tmp_path, cut):
    path = tmp_path / "x.journal"
    journal = Journal(path, "key", 1 << 40)
    for number in range(6):
        journal.add((number != 2, 0, 1, 5, 6, 0, 99, 10, 4096 + 10 * number), number, "bad" if number == 2 else "")
        if number % 2:
            journal.flush()
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, "key", 1 << 40)
    assert len(again.records) in (0, 2, 4)
    assert again.records["offset"].tolist() == [4096 + 10 * n for n in range(len(again.records))]
    assert again.reasons == ({2: "bad"} if len(again.records) == 4 else {})
    again.close()
    assert len(Journal(path, "other key", 1 << 40).records) == 0


def test_a_flipped_bit_ends_a_journal_before_its_block(tmp_path):
    path = tmp_path / "x.journal"
    journal = Journal(path, "key", 1 << 40)
    for number in range(3):
        journal.add((True, 0, 1, 5, 6, 0, 99, 10, 4096 + 10 * number), number, "")
        journal.flush()
    journal.close()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert len(Journal(path, "key", 1 << 40).records) == 2
