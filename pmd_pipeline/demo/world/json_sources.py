"""Sources with JSON annotations: COCO, Localized Narratives, Visual Genome and RedCaps."""

import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

from pmd_pipeline.demo.world.captions import (
    five_sentences,
    narrative,
    phrase,
    post_title,
    region_phrases,
)
from pmd_pipeline.demo.world.responses import RESPONSE_REASONS
from pmd_pipeline.demo.world.sample_source import SampleImage, SampleSource

_COCO_QUIRKS = (
    *("uncaptioned", "missing", "blank", "cmyk", "no_name", "echo", "busy", "gone", "newline"),
    *("mislabelled", "cut", "moved"),
)

_LN_QUIRKS = (
    *("leak", "missing", "again", "flickr30k_val", "blank", "coco_val", "broken", "absent"),
    *(
        "flickr30k_test",
        "rotated",
        "cut_line",
        "open_images_validation",
        "leak",
        "page",
        "rate_limited_once",
    ),
    *("ade20k_validation", "open_images_test", "cut", "webp", "coco_val"),
)

_VG_QUIRKS = (
    *(
        "leak",
        "outside",
        "missing",
        "flat",
        "uncaptioned",
        "shared",
        "cropped",
        "orphan",
        "over",
        "blank",
    ),
    *(
        "no_phrase",
        "rotated",
        "no_regions",
        "echo",
        "busy",
        "leak",
        "broken",
        "shared",
        "cut",
        "flat",
    ),
)

_REDCAPS_QUIRKS = (
    *("removed", "several", "missing", "blank", "unavailable", "no_url", "png", "crosspost"),
    *(
        "removed",
        "gif",
        "emoji",
        "gone",
        "rate_limited_once",
        "removed",
        "several",
        "forbidden",
        "withheld",
    ),
    *("de", "empty", "again", "webp", "unavailable", "cut", "rate_limited", "rotated"),
)

_FLICKR_LICENCES = (
    ("Attribution-NonCommercial-ShareAlike License", "by-nc-sa"),
    ("Attribution-NonCommercial License", "by-nc"),
    ("Attribution-NonCommercial-NoDerivs License", "by-nc-nd"),
    ("Attribution License", "by"),
)

_SUBREDDITS = ("itookapicture", "drawings", "crafts")
_YEARS = (2017, 2018, 2019, 2020)

_KARPATHY_CYCLE = 20
_VAL, _TEST = 18, 19
_RESTVAL = 14


def coco(source: SampleSource) -> None:
    """COCO: Karpathy's file, and COCO's files of 2014 with size, licence and Flickr id."""
    karpathy: list[dict[str, Any]] = []
    by_folder: dict[str, list[dict[str, Any]]] = {"train2014": [], "val2014": []}
    annotations = defaultdict[str, list[dict[str, Any]]](list)
    for sample in source.samples(_COCO_QUIRKS):
        split = karpathy_split(sample.number)
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{coco_id(sample.number):012d}.jpg"
        # Localized Narratives use the photo's name of 2017
        for path in (f"{folder}/{name}", _path_of_2017(sample.number)):
            source.put(f"http://images.cocodataset.org/{path}", sample)
        image = _karpathy_image(sample, name, folder, split)
        karpathy.append(image)
        if sample.quirk == "no_name":
            del image["filename"]
            source.expect(sample, "bad_row")
            continue
        by_folder[folder].append(_coco_image(sample, name, folder))
        heldout = "heldout" if split in {"val", "test"} else None
        for sentence in image["sentences"]:
            number, text = sentence["sentid"], sentence["raw"]
            annotations[folder].append({"image_id": image["cocoid"], "id": number, "caption": text})
            source.expect(sample, heldout or (None if text.strip() else "no_text"))
        if not image["sentences"]:
            source.expect(sample, heldout or "no_caption")
    source.files["dataset_coco.json"] = _json_bytes({"images": karpathy, "dataset": "coco"})
    for folder, images in by_folder.items():
        source.files[f"captions_{folder}.json"] = _json_bytes(
            {
                "info": {"description": "COCO 2014 Dataset", "year": 2014, "version": "1.0"},
                "images": images,
                "licenses": [
                    {
                        "url": f"http://creativecommons.org/licenses/{short}/2.0/",
                        "id": id_,
                        "name": n,
                    }
                    for id_, (n, short) in enumerate(_FLICKR_LICENCES, start=1)
                ],
                "annotations": annotations[folder],
            }
        )


def coco_id(number: int) -> int:
    """COCO's id of image `number`."""
    return 139 + 1201 * number


def karpathy_split(number: int) -> str:
    """Karpathy's split of COCO's image `number`."""
    position = number % _KARPATHY_CYCLE
    if position in {_VAL, _TEST}:
        return "val" if position == _VAL else "test"
    return "restval" if position >= _RESTVAL else "train"


def localized_narratives(source: SampleSource) -> None:
    """Localized Narratives: the small form, a file for each collection and split."""
    lines: defaultdict[str, list[str]] = defaultdict(list)
    for sample in source.samples(_LN_QUIRKS):
        part, image_id, original = _ln_image(source, sample)
        dropped = {"flickr30k_val": "heldout", "flickr30k_test": "heldout"}.get(part)
        dropped = dropped or (None if part.endswith(("_train", "_train_v6")) else "split")
        dropped = "heldout" if sample.quirk == "leak" else dropped
        if sample.quirk == "cut_line":
            lines[part].append('{"dataset_id": "openimages_train", "image_id": "0fe\n')
            source.expect(sample, "bad_row")
            continue
        for annotator in range(2 if sample.quirk == "again" else 1):
            text = "" if sample.quirk == "blank" else narrative(original.scene, sample.rng)
            row = {
                "dataset_id": _DATASETS[part],
                "image_id": image_id,
                "annotator_id": annotator + sample.number % 90,
                "caption": text,
            }
            lines[part].append(f"{json.dumps(row)}\n")
            source.expect(
                original, dropped or (None if text else "no_text"), pairs=max(1, text.count("."))
            )
    for part in _DATASETS:
        source.files[f"{part}_captions.jsonl"] = "".join(lines[part]).encode()


def visual_genome(source: SampleSource) -> None:
    """Visual Genome: version 1.2, regions and images in two lists."""
    images: list[dict[str, Any]] = []
    region_lists: list[dict[str, Any]] = []
    for sample in source.samples(_VG_QUIRKS):
        original = _vg_original(source, sample)
        image_id = sample.number + 1
        folder = "VG_100K_2" if sample.number % 3 else "VG_100K"
        url = f"https://cs.stanford.edu/people/rak248/{folder}/{image_id}.jpg"
        width, height = original.scene.frame
        shared = sample.quirk in {"leak", "shared"}
        image = {
            "width": width,
            "url": source.put(url, original),
            "height": height,
            "image_id": image_id,
            "coco_id": coco_id(original.number) if shared else None,
            "flickr_id": int(sample.random_digits(10)) if shared or sample.number % 2 else None,
        }
        if sample.quirk != "orphan":
            images.append(image)
        if sample.quirk == "no_regions":
            source.expect(original, "no_caption")
            continue
        regions = _vg_regions(source, original)
        region_lists.append({"regions": regions, "id": image_id})
        if not regions:
            source.expect(original, "no_caption")
    source.files["region_descriptions.json"] = _json_bytes(region_lists)
    source.files["image_data.json"] = _json_bytes(images)


def redcaps(source: SampleSource) -> None:
    """RedCaps: a file for each subreddit and year, one of them without a post."""
    posts: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for sample in source.samples(_REDCAPS_QUIRKS):
        subreddit = _SUBREDDITS[sample.number % len(_SUBREDDITS)]
        year = _YEARS[sample.number // 3 % len(_YEARS)]
        for post in _posts(source, sample, subreddit, year):
            posts[subreddit, year].append(post)
            blank = "no_text" if not post["raw_caption"] else None
            source.expect(sample, blank if "url" in post else "bad_row")
    posts["geometryisneat", 2018] = []
    for (subreddit, year), annotations in posts.items():
        document: dict[str, Any] = {"annotations": annotations}
        if year != _YEARS[0]:
            info = {"start_date": f"{year}-01-01", "end_date": f"{year}-12-31"}
            document = {"info": {**info, "url": "https://redcaps.xyz", "version": "1.0"}} | document
        source.files[f"annotations/{subreddit}_{year}.json"] = _json_bytes(document)


def _path_of_2017(number: int) -> str:
    return f"train2017/{coco_id(number):012d}.jpg"


def _karpathy_image(sample: SampleImage, name: str, folder: str, split: str) -> dict[str, Any]:
    texts = five_sentences(sample.scene, sample.rng)
    if sample.quirk == "uncaptioned":
        texts = []
    elif sample.quirk == "blank":
        texts[1] = " "
    elif sample.quirk == "echo":
        texts[1] = texts[0]
    elif sample.quirk == "newline":
        texts[2] = f"{texts[2]}\n"
    first = 5 * sample.number
    sentences = [
        {
            "tokens": text.lower().replace(".", "").split(),
            "raw": text,
            "imgid": sample.number,
            "sentid": first + position,
        }
        for position, text in enumerate(texts)
    ]
    return {
        "filepath": folder,
        "sentids": [sentence["sentid"] for sentence in sentences],
        "filename": name,
        "imgid": sample.number,
        "split": split,
        "sentences": sentences,
        "cocoid": coco_id(sample.number),
    }


def _coco_image(sample: SampleImage, name: str, folder: str) -> dict[str, Any]:
    width, height = sample.scene.frame
    photo = f"{sample.random_digits(10)}_{sample.random_hex(10)}_z.jpg"
    return {
        "license": sample.number % len(_FLICKR_LICENCES) + 1,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{folder}/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-21 01:37:46",
        "flickr_url": f"http://farm4.staticflickr.com/3448/{photo}",
        "id": coco_id(sample.number),
    }


_DATASETS = {
    "open_images_train_v6": "openimages_train",
    "open_images_validation": "openimages_validation",
    "open_images_test": "openimages_test",
    "coco_train": "mscoco_train2017",
    "coco_val": "mscoco_val2017",
    "flickr30k_train": "Flick30k_train",
    "flickr30k_val": "Flick30k_val",
    "flickr30k_test": "Flick30k_test",
    "ade20k_train": "ADE20k_train",
    "ade20k_validation": "ADE20k_validation",
}
"""`dataset_id` of the lines of each file."""

_TRAIN = ("open_images_train_v6", "coco_train", "flickr30k_train", "ade20k_train")


def _ln_image(source: SampleSource, sample: SampleImage) -> tuple[str, str, SampleImage]:
    """The file of an image's narratives, its id there, and the image in its own source."""
    part = _TRAIN[sample.number % len(_TRAIN)]
    if sample.quirk in _DATASETS:
        part = sample.quirk
    elif sample.quirk == "leak":
        part = "coco_train"
    elif sample.quirk == "absent":
        part = "ade20k_train"
    elif sample.quirk in RESPONSE_REASONS or sample.quirk == "cut_line":
        part = "open_images_train_v6"
    if part.startswith("coco"):
        number = _coco_number(source, sample)
        original = source.sample(number, source.quirk_of(number, _COCO_QUIRKS), owner="coco")
        folder = "train2017" if part == "coco_train" else "val2017"
        source.put(f"http://images.cocodataset.org/{folder}/{coco_id(number):012d}.jpg", original)
        return part, str(coco_id(number)), original
    if part.startswith("flickr30k"):
        image_id = sample.random_digits(10)
        source.images[f"flickr30k-images/{image_id}.jpg"] = sample.scene
        return part, image_id, sample
    if part.startswith("ade20k"):
        split = "train" if part == "ade20k_train" else "val"
        image_id = f"ADE_{split}_{sample.number + 1:08d}"
        folder = "training" if split == "train" else "validation"
        path = f"ADEChallengeData2016/images/{folder}/{image_id}.jpg"
        if sample.quirk != "absent":
            source.images[path] = sample.scene
        return part, image_id, sample
    image_id = sample.random_hex(16)
    split = part.removeprefix("open_images_").removesuffix("_v6")
    source.put(f"https://s3.amazonaws.com/open-images-dataset/{split}/{image_id}.jpg", sample)
    return part, image_id, sample


def _coco_number(source: SampleSource, sample: SampleImage) -> int:
    """Number of the COCO image that another source shares; a held-out one for a leak."""
    block = min(sample.number // _KARPATHY_CYCLE, source.scenes // _KARPATHY_CYCLE - 1)
    if sample.quirk == "leak":
        return block * _KARPATHY_CYCLE + (_TEST if sample.number % 2 else _VAL)
    if sample.quirk in {"coco_val", "shared"}:
        return block * _KARPATHY_CYCLE
    return sample.number


def _vg_original(source: SampleSource, sample: SampleImage) -> SampleImage:
    """The image in its own source: COCO's if Visual Genome shares it."""
    if sample.quirk not in {"leak", "shared"}:
        return sample
    original = source.sample(_coco_number(source, sample), owner="coco")
    return replace(original, quirk=sample.quirk)


def _vg_regions(source: SampleSource, sample: SampleImage) -> list[dict[str, Any]]:
    """The regions of an image, two for each shape; counts their pairs."""
    if sample.quirk == "uncaptioned":
        return []
    dropped = {"leak": "heldout", "orphan": "no_image"}.get(sample.quirk or "")
    regions: list[dict[str, Any]] = []

    def add(texts: str | None, box: tuple[int, int, int, int], reason: str | None) -> None:
        region = {
            "region_id": 1382 + 100 * sample.number + len(regions),
            "width": box[2] - box[0],
            "height": box[3] - box[1],
            "image_id": sample.number + 1,
            "phrase": texts,
            "y": box[1],
            "x": box[0],
        }
        regions.append({key: value for key, value in region.items() if value is not None})
        source.expect(sample, reason)

    for group, box in sample.scene.shapes:
        for texts in sample.rng.sample(region_phrases(group), 2):
            add(texts, box, dropped)
    width, height = sample.scene.frame
    group, box = sample.scene.shapes[-1]
    texts = region_phrases(group)[0]
    odd: dict[str, tuple[str | None, tuple[int, int, int, int], str | None]] = {
        "outside": (texts, (width + 5, 10, width + 60, 70), "bad_box"),
        "flat": (texts, (box[0], box[1], box[0], box[3]), "bad_box"),
        "over": (texts, (box[0], box[1], width + 20, height + 20), None),
        "blank": (" ", box, "no_text"),
        "no_phrase": (None, box, "bad_row"),
        "echo": (f"{texts} \n", box, None),
    }
    if sample.quirk in odd:
        add(*odd[sample.quirk])
    return regions


def _posts(
    source: SampleSource, sample: SampleImage, subreddit: str, year: int
) -> list[dict[str, Any]]:
    """The posts of one image: one, or two if it was posted again."""
    number, quirk = sample.number, sample.quirk
    title = sample.caption(post_title)
    tail = {"emoji": " \N{ARTIST PALETTE}\N{SPARKLES}", "crosspost": " (x-post)"}.get(
        quirk or "", ""
    )
    if not tail and title and number % 3 == 0:
        tail = " [OC]" if number % 2 else " [4000x3000]"
    post: dict[str, Any] = {
        "image_id": sample.random_hex(6),
        "author": "None" if number % 9 == 0 else "sample_person",
        "url": source.put(_post_url(sample), sample),
        "raw_caption": f"{title}{tail}",
        "caption": title.lower().encode("ascii", errors="ignore").decode().strip(),
        "subreddit": subreddit,
        "score": number % 50,
        "created_utc": 1_302_998_814 + 86_400 * (365 * (year - 2011) + number),
        "permalink": f"/r/{subreddit}/comments/{number}/{phrase(sample.scene.groups[0])}/",
    }
    post["permalink"] = post["permalink"].replace(" ", "_")
    if quirk == "several":
        separator = "," if number % 2 else " "
        post["url"] += f"{separator}https://i.imgur.com/{sample.random_hex(7)}.jpg"
    elif quirk == "no_url":
        del post["url"]
    elif quirk == "crosspost":
        del post["score"]
        post["crosspost_parents"] = [sample.random_hex(6)]
    elif quirk == "again":
        return [post, {**post, "image_id": sample.random_hex(6)}]
    return [post]


def _post_url(sample: SampleImage) -> str:
    imgur = f"https://i.imgur.com/{sample.random_hex(7)}.jpg"
    reddit = f"https://i.redd.it/{sample.random_hex(13)}.jpg"
    flickr = f"https://farm9.staticflickr.com/8345/{sample.random_digits(10)}_{sample.random_hex(10)}_b.jpg"
    if sample.quirk in {"removed", "unavailable"}:
        return imgur if sample.quirk == "removed" else flickr
    return (reddit, imgur, reddit, reddit, flickr)[sample.number % 5]


def _json_bytes(document: object) -> bytes:
    return json.dumps(document).encode()
