"""The kinds of findings that only data to classify have; `codes.py` holds those that they share with other data."""

ERRORS = {
    "one-class": ("fewer than two classes have images, so there is nothing to learn", "Add images of another class."),
    "missing-file": ("image that the table names and that is not there", "Correct the path, or copy the image there."),
    "table-line": (
        "line that training refuses: without image or label, with an unknown part, or of an image named before",
        "Complete the line, or remove it.",
    ),
    "class-unknown": (
        "class in the data that data.labels does not name",
        "Add it to data.labels, or correct the label.",
    ),
    "class-out-of-range": (
        "label that is the number of no class",
        "Correct the label, or name all classes in data.labels.",
    ),
    "class-numbers": (
        "labels of another form than the task's: one whole number for each image, or 0 and 1 for each of several",
        "Write train_labels, val_labels and test_labels as (N, 1), or (N, classes) with data.task multi-label.",
    ),
    "same-image-different-classes": (
        "the same image, byte for byte, with different classes",
        "Find the right one; keep the image once.",
    ),
    "class-never-trained": (
        "class of validation or test images that no training image has",
        "Choose another data.split, or move images of it to training.",
    ),
}

WARNINGS = {
    "class-empty": ("class without images", "Remove the folder or the name, or add images."),
    "class-imbalance": (
        "classes of which the largest has more than ten times the cases of the smallest",
        "Weigh the loss (model.loss.class_weights), and judge by balanced accuracy, not by accuracy.",
    ),
    "class-names-alike": (
        "classes whose names differ by upper case, blanks, - or _ alone: perhaps one class",
        "Give both the same name, if they are one.",
    ),
    "class-missing-in-part": (
        "class that validation or test has no image of, so that its scores are undefined there",
        "Choose another data.split or seed, so that each part holds every class.",
    ),
    "image-without-class": ("image beside the class folders, left out", "Move it into the folder of its class."),
}
