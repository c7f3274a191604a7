"""A validation split for data that comes without one."""

from datasets import ClassLabel, Dataset, DatasetDict


def hold_out(rows: Dataset, share: float, seed: int = 0) -> DatasetDict:
    """Split `rows` into `train` and `validation`, the latter with a `share` of them.

    Rows are drawn at random, of each class its share where a column is of `ClassLabel` (the first such column) and the
    classes are large enough. Lines of a text file are not drawn: the last ones are held out.

    Args:
        rows: of a `datasets.Dataset`.
        share: between 0 and 1.
        seed: of what is drawn.

    Raises:
        ValueError: for a share that leaves one of the splits empty.
    """
    if rows.info.builder_name == "text":  # lines of running text: drawn at random they would tear it to pieces
        halves = rows.train_test_split(share, shuffle=False)
    else:
        stratify = next((name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)), None)
        try:
            halves = rows.train_test_split(share, seed=seed, stratify_by_column=stratify)
        except ValueError:  # a class with a single example, or fewer held out than classes
            halves = rows.train_test_split(share, seed=seed)
    return DatasetDict(train=halves["train"], validation=halves["test"])
