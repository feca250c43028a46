"""The sources whose upstream is JSON: COCO, Localized Narratives, Visual Genome and RedCaps."""

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
from pmd_pipeline.demo.world.plan import Picture, Plan
from pmd_pipeline.demo.world.responses import FAILURE

_COCO_QUIRKS = (
    *("untold", "missing", "blank", "cmyk", "no_name", "echo", "busy", "gone", "newline"),
    *("mislabelled", "cut", "moved"),
)

_LN_QUIRKS = (
    *("leak", "missing", "again", "flickr30k_val", "blank", "coco_val", "broken", "absent"),
    *("flickr30k_test", "rotated", "cut_line", "open_images_validation", "leak", "page", "hurried"),
    *("ade20k_validation", "open_images_test", "cut", "webp", "coco_val"),
)

_VG_QUIRKS = (
    *(
        "leak",
        "outside",
        "missing",
        "flat",
        "untold",
        "shared",
        "cropped",
        "orphan",
        "over",
        "blank",
    ),
    *("no_phrase", "rotated", "unseen", "echo", "busy", "leak", "broken", "shared", "cut", "flat"),
)

_REDCAPS_QUIRKS = (
    *("removed", "several", "missing", "blank", "unavailable", "no_url", "png", "crosspost"),
    *("removed", "gif", "emoji", "gone", "hurried", "removed", "several", "forbidden", "withheld"),
    *("de", "empty", "again", "webp", "unavailable", "cut", "overrun", "rotated"),
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


def coco(plan: Plan) -> None:
    """COCO: Karpathy's file, and COCO's own of 2014 that know size, licence and Flickr id."""
    karpathy: list[dict[str, Any]] = []
    by_folder: dict[str, list[dict[str, Any]]] = {"train2014": [], "val2014": []}
    annotations = defaultdict[str, list[dict[str, Any]]](list)
    for picture in plan.pictures(_COCO_QUIRKS):
        split = karpathy_split(picture.number)
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{coco_id(picture.number):012d}.jpg"
        # the same photo has another name in 2017, by which Localized Narratives ask for it
        for path in (f"{folder}/{name}", _path_of_2017(picture.number)):
            plan.put(f"http://images.cocodataset.org/{path}", picture)
        image = _karpathy_image(picture, name, folder, split)
        karpathy.append(image)
        if picture.quirk == "no_name":
            del image["filename"]
            plan.expect(picture, "bad_row")
            continue
        by_folder[folder].append(_coco_image(picture, name, folder))
        heldout = "heldout" if split in {"val", "test"} else None
        for sentence in image["sentences"]:
            number, text = sentence["sentid"], sentence["raw"]
            annotations[folder].append({"image_id": image["cocoid"], "id": number, "caption": text})
            plan.expect(picture, heldout or (None if text.strip() else "no_text"))
        if not image["sentences"]:
            plan.expect(picture, heldout or "no_caption")
    plan.files["dataset_coco.json"] = _json({"images": karpathy, "dataset": "coco"})
    for folder, images in by_folder.items():
        plan.files[f"captions_{folder}.json"] = _json(
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
    """COCO's id of picture `number`."""
    return 139 + 1201 * number


def karpathy_split(number: int) -> str:
    """Karpathy's split of COCO's picture `number`."""
    place = number % _KARPATHY_CYCLE
    if place in {_VAL, _TEST}:
        return "val" if place == _VAL else "test"
    return "restval" if place >= _RESTVAL else "train"


def localized_narratives(plan: Plan) -> None:
    """Localized Narratives: the small form, a file for each collection and split."""
    lines: defaultdict[str, list[str]] = defaultdict(list)
    for picture in plan.pictures(_LN_QUIRKS):
        part, image_id, shown = _ln_image(plan, picture)
        dropped = {"flickr30k_val": "heldout", "flickr30k_test": "heldout"}.get(part)
        dropped = dropped or (None if part.endswith(("_train", "_train_v6")) else "split")
        dropped = "heldout" if picture.quirk == "leak" else dropped
        if picture.quirk == "cut_line":
            lines[part].append('{"dataset_id": "openimages_train", "image_id": "0fe\n')
            plan.expect(picture, "bad_row")
            continue
        for annotator in range(2 if picture.quirk == "again" else 1):
            text = "" if picture.quirk == "blank" else narrative(shown.scene, picture.dice)
            told = {
                "dataset_id": _DATASETS[part],
                "image_id": image_id,
                "annotator_id": annotator + picture.number % 90,
                "caption": text,
            }
            lines[part].append(f"{json.dumps(told)}\n")
            plan.expect(
                shown, dropped or (None if text else "no_text"), pairs=max(1, text.count("."))
            )
    for part in _DATASETS:
        plan.files[f"{part}_captions.jsonl"] = "".join(lines[part]).encode()


def visual_genome(plan: Plan) -> None:
    """Visual Genome: version 1.2, regions and images in two lists."""
    images: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    for picture in plan.pictures(_VG_QUIRKS):
        shown = _vg_picture(plan, picture)
        image_id = picture.number + 1
        folder = "VG_100K_2" if picture.number % 3 else "VG_100K"
        url = f"https://cs.stanford.edu/people/rak248/{folder}/{image_id}.jpg"
        width, height = shown.scene.frame
        shared = picture.quirk in {"leak", "shared"}
        image = {
            "width": width,
            "url": plan.put(url, shown),
            "height": height,
            "image_id": image_id,
            "coco_id": coco_id(shown.number) if shared else None,
            "flickr_id": int(picture.digits(10)) if shared or picture.number % 2 else None,
        }
        if picture.quirk != "orphan":
            images.append(image)
        if picture.quirk == "unseen":
            plan.expect(shown, "no_caption")
            continue
        regions = _vg_regions(plan, shown)
        described.append({"regions": regions, "id": image_id})
        if not regions:
            plan.expect(shown, "no_caption")
    plan.files["region_descriptions.json"] = _json(described)
    plan.files["image_data.json"] = _json(images)


def redcaps(plan: Plan) -> None:
    """RedCaps: a file for each subreddit and year, some of them without a post."""
    posts: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for picture in plan.pictures(_REDCAPS_QUIRKS):
        subreddit = _SUBREDDITS[picture.number % len(_SUBREDDITS)]
        year = _YEARS[picture.number // 3 % len(_YEARS)]
        for post in _posts(plan, picture, subreddit, year):
            posts[subreddit, year].append(post)
            blank = "no_text" if not post["raw_caption"] else None
            plan.expect(picture, blank if "url" in post else "bad_row")
    posts["geometryisneat", 2018] = []
    for (subreddit, year), annotations in posts.items():
        document: dict[str, Any] = {"annotations": annotations}
        if year != _YEARS[0]:
            info = {"start_date": f"{year}-01-01", "end_date": f"{year}-12-31"}
            document = {"info": {**info, "url": "https://redcaps.xyz", "version": "1.0"}} | document
        plan.files[f"annotations/{subreddit}_{year}.json"] = _json(document)


def _path_of_2017(number: int) -> str:
    return f"train2017/{coco_id(number):012d}.jpg"


def _karpathy_image(picture: Picture, name: str, folder: str, split: str) -> dict[str, Any]:
    said = five_sentences(picture.scene, picture.dice)
    if picture.quirk == "untold":
        said = []
    elif picture.quirk == "blank":
        said[1] = " "
    elif picture.quirk == "echo":
        said[1] = said[0]
    elif picture.quirk == "newline":
        said[2] = f"{said[2]}\n"
    first = 5 * picture.number
    sentences = [
        {
            "tokens": text.lower().replace(".", "").split(),
            "raw": text,
            "imgid": picture.number,
            "sentid": first + place,
        }
        for place, text in enumerate(said)
    ]
    return {
        "filepath": folder,
        "sentids": [sentence["sentid"] for sentence in sentences],
        "filename": name,
        "imgid": picture.number,
        "split": split,
        "sentences": sentences,
        "cocoid": coco_id(picture.number),
    }


def _coco_image(picture: Picture, name: str, folder: str) -> dict[str, Any]:
    width, height = picture.scene.frame
    photo = f"{picture.digits(10)}_{picture.hexes(10)}_z.jpg"
    return {
        "license": picture.number % len(_FLICKR_LICENCES) + 1,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{folder}/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-21 01:37:46",
        "flickr_url": f"http://farm4.staticflickr.com/3448/{photo}",
        "id": coco_id(picture.number),
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
"""What the lines of each file name as their data set."""

_TRAIN = ("open_images_train_v6", "coco_train", "flickr30k_train", "ade20k_train")


def _ln_image(plan: Plan, picture: Picture) -> tuple[str, str, Picture]:
    """The file that a picture's narratives are in, its id there, and the picture as shown."""
    part = _TRAIN[picture.number % len(_TRAIN)]
    if picture.quirk in _DATASETS:
        part = picture.quirk
    elif picture.quirk == "leak":
        part = "coco_train"
    elif picture.quirk == "absent":
        part = "ade20k_train"
    elif picture.quirk in FAILURE or picture.quirk == "cut_line":
        part = "open_images_train_v6"
    if part.startswith("coco"):
        number = _coco_number(plan, picture)
        shown = plan.picture(number, plan.quirk_of(number, _COCO_QUIRKS), source="coco")
        folder = "train2017" if part == "coco_train" else "val2017"
        plan.put(f"http://images.cocodataset.org/{folder}/{coco_id(number):012d}.jpg", shown)
        return part, str(coco_id(number)), shown
    if part.startswith("flickr30k"):
        image_id = picture.digits(10)
        plan.images[f"flickr30k-images/{image_id}.jpg"] = picture.scene
        return part, image_id, picture
    if part.startswith("ade20k"):
        split = "train" if part == "ade20k_train" else "val"
        image_id = f"ADE_{split}_{picture.number + 1:08d}"
        folder = "training" if split == "train" else "validation"
        path = f"ADEChallengeData2016/images/{folder}/{image_id}.jpg"
        if picture.quirk != "absent":
            plan.images[path] = picture.scene
        return part, image_id, picture
    image_id = picture.hexes(16)
    split = part.removeprefix("open_images_").removesuffix("_v6")
    plan.put(f"https://s3.amazonaws.com/open-images-dataset/{split}/{image_id}.jpg", picture)
    return part, image_id, picture


def _coco_number(plan: Plan, picture: Picture) -> int:
    """The number of the COCO picture that another source's picture is: held out for a leak."""
    block = min(picture.number // _KARPATHY_CYCLE, plan.scenes // _KARPATHY_CYCLE - 1)
    if picture.quirk == "leak":
        return block * _KARPATHY_CYCLE + (_TEST if picture.number % 2 else _VAL)
    if picture.quirk in {"coco_val", "shared"}:
        return block * _KARPATHY_CYCLE
    return picture.number


def _vg_picture(plan: Plan, picture: Picture) -> Picture:
    """The picture as shown: COCO's where Visual Genome shares it."""
    if picture.quirk not in {"leak", "shared"}:
        return picture
    shown = plan.picture(_coco_number(plan, picture), source="coco")
    return replace(shown, quirk=picture.quirk)


def _vg_regions(plan: Plan, picture: Picture) -> list[dict[str, Any]]:
    """The regions of a picture, two for each shape, with their pairs expected."""
    if picture.quirk == "untold":
        return []
    dropped = {"leak": "heldout", "orphan": "no_image"}.get(picture.quirk or "")
    regions: list[dict[str, Any]] = []

    def add(said: str | None, box: tuple[int, int, int, int], reason: str | None) -> None:
        region = {
            "region_id": 1382 + 100 * picture.number + len(regions),
            "width": box[2] - box[0],
            "height": box[3] - box[1],
            "image_id": picture.number + 1,
            "phrase": said,
            "y": box[1],
            "x": box[0],
        }
        regions.append({key: value for key, value in region.items() if value is not None})
        plan.expect(picture, reason)

    for group, box in picture.scene.shapes:
        for said in picture.dice.sample(region_phrases(group), 2):
            add(said, box, dropped)
    width, height = picture.scene.frame
    group, box = picture.scene.shapes[-1]
    said = region_phrases(group)[0]
    odd: dict[str, tuple[str | None, tuple[int, int, int, int], str | None]] = {
        "outside": (said, (width + 5, 10, width + 60, 70), "bad_box"),
        "flat": (said, (box[0], box[1], box[0], box[3]), "bad_box"),
        "over": (said, (box[0], box[1], width + 20, height + 20), None),
        "blank": (" ", box, "no_text"),
        "no_phrase": (None, box, "bad_row"),
        "echo": (f"{said} \n", box, None),
    }
    if picture.quirk in odd:
        add(*odd[picture.quirk])
    return regions


def _posts(plan: Plan, picture: Picture, subreddit: str, year: int) -> list[dict[str, Any]]:
    """The posts of one picture: one, or two where it was posted again."""
    number, quirk = picture.number, picture.quirk
    title = picture.said(post_title)
    tail = {"emoji": " \N{ARTIST PALETTE}\N{SPARKLES}", "crosspost": " (x-post)"}.get(
        quirk or "", ""
    )
    if not tail and title and number % 3 == 0:
        tail = " [OC]" if number % 2 else " [4000x3000]"
    post: dict[str, Any] = {
        "image_id": picture.hexes(6),
        "author": "None" if number % 9 == 0 else "sample_person",
        "url": plan.put(_post_url(picture), picture),
        "raw_caption": f"{title}{tail}",
        "caption": title.lower().encode("ascii", errors="ignore").decode().strip(),
        "subreddit": subreddit,
        "score": number % 50,
        "created_utc": 1_302_998_814 + 86_400 * (365 * (year - 2011) + number),
        "permalink": f"/r/{subreddit}/comments/{number}/{phrase(picture.scene.groups[0])}/",
    }
    post["permalink"] = post["permalink"].replace(" ", "_")
    if quirk == "several":
        separator = "," if number % 2 else " "
        post["url"] += f"{separator}https://i.imgur.com/{picture.hexes(7)}.jpg"
    elif quirk == "no_url":
        del post["url"]
    elif quirk == "crosspost":
        del post["score"]
        post["crosspost_parents"] = [picture.hexes(6)]
    elif quirk == "again":
        return [post, {**post, "image_id": picture.hexes(6)}]
    return [post]


def _post_url(picture: Picture) -> str:
    imgur = f"https://i.imgur.com/{picture.hexes(7)}.jpg"
    reddit = f"https://i.redd.it/{picture.hexes(13)}.jpg"
    flickr = f"https://farm9.staticflickr.com/8345/{picture.digits(10)}_{picture.hexes(10)}_b.jpg"
    if picture.quirk in {"removed", "unavailable"}:
        return imgur if picture.quirk == "removed" else flickr
    return (reddit, imgur, reddit, reddit, flickr)[picture.number % 5]


def _json(document: object) -> bytes:
    return json.dumps(document).encode()
