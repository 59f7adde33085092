"""A JSON file of captions or conversations: by its own name, or as the only one for training in its folder."""

from collections.abc import Sequence

from sparselora_jax.data.benchmarks.sniff import FileFacts, Head
from sparselora_jax.data.sources import caption_lists, conversations
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import OpenedSource
from sparselora_jax.runtime.errors import DataError

SHOWN = 4  # files that a message names


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a file of captions or conversations; None for other files.

    Args:
      head: the beginning of the file.
    """
    return conversations.recognise(head) or caption_lists.recognise(head)


class JsonFormat:
    """Opens JSON files of captions or conversations; see `source.SourceFormat`."""

    title = 'captions of COCO, Flickr30k, Visual Genome or a list of LAVIS, or conversations of LLaVA, in a JSON file'
    takes_images = True

    def open(self, place: Place) -> OpenedSource | None:
        """Return the records of the file; None if no file has this form.

        Args:
          place: the file, or a folder with one file for training.

        Raises:
          DataError: several files could be meant, or none is for training; or the file is broken.
        """
        known = [file for head in place.heads if (file := recognise(head)) is not None]
        if not known:
            # The fault may hide the keys that would tell, so it says most about a file that was named.
            if not place.path.is_dir() and place.heads and place.heads[0].fault is not None:
                raise place.heads[0].fault
            return None
        chosen = known[0] if place.path.is_file() else _only_for_training(place, known)
        if chosen.kind == conversations.KIND:
            return conversations.Conversations(chosen.path, place)
        return caption_lists.open_captions(chosen, place)


def _only_for_training(place: Place, known: Sequence[FileFacts]) -> FileFacts:
    """Return the file for training among those of a folder.

    Raises:
      DataError: there is none, or there are several.
    """
    training = [file for file in known if file.mark('subset').startswith(caption_lists.TRAIN)]
    if len(training) == 1:
        return training[0]
    names = ', '.join(str(file.path) for file in (training or known)[:SHOWN])
    if training:
        raise DataError(f'{place.path}: {len(training)} files could be meant: {names}; name one of them')
    raise DataError(f'{place.path}: no file for training, only {names}; name one of them if it is meant')
