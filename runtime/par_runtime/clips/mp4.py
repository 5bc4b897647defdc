"""MP4 files with H.264, through PyAV: written so that they play everywhere, read with nothing but what they need."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from par_runtime.errors import RequestError, how_to_install
from par_runtime.images.opening import MOST_PIXELS
from par_runtime.late import importing

BT709 = 1  #: FFmpeg's number of this colour space, its primaries and its curve; also of "limited range"
CODECS = ("h264", "hevc", "av1", "libdav1d", "vp9", "mpeg4")
#: High quality: frames of small models are noisy, and a player enlarges them. Without mbtree, because with it x264 does
#: not give the same bytes each time (seen at sizes that are no multiple of 32).
ENCODER = {"crf": "12", "preset": "slow", "x264-params": "mbtree=0"}
READER = {
    "protocol_whitelist": "none",  # no other file and no address may be opened
    "enable_drefs": "0",
    "max_streams": "16",
    "max_pixels": str(MOST_PIXELS),
}


def library() -> Any:
    """PyAV. Raises RequestError where it is not installed."""
    try:
        with importing("av", "av.subtitles.stream"):
            import av

            with suppress(ImportError):  # what av imports itself when it opens a file, where no fork waits for it
                import av.subtitles.stream
    except ImportError as error:
        raise RequestError(
            f"MP4 needs PyAV, which is not installed; {how_to_install('video')}, or take a .gif, .webp or .apng"
        ) from error
    return av


def encoded(frames: NDArray[np.uint8], fps: float, text: str) -> bytes:
    """The bytes of an MP4 of ``frames`` [T,H,W,3], whose sides are even, with ``text`` as its comment.

    The same arguments give the same bytes. Raises RequestError, OSError.
    """
    av = library()
    if "libx264" not in av.codecs_available:
        raise RequestError("this PyAV has no encoder of H.264 (libx264); install its wheel, or take a .gif or .webp")
    height, width = frames.shape[1:3]
    out, how = _InMemory(), {"movflags": "+faststart"}
    with av.open(out, "w", format="mp4", options=how, io_open=lambda *_: _Again(out)) as container:
        container.metadata["comment"] = text
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=dict(ENCODER))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # with more, other machines write other bytes
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = BT709
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(yuv(pixels), format="yuv420p")
            frame.colorspace = frame.color_range = BT709
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


class _InMemory(io.BytesIO):
    """A file that FFmpeg writes: on no disk, so that a full one is met where the user's file is written."""

    name = "clip.mp4"  #: by which FFmpeg opens it again, to move what it knew last to the beginning


class _Again:
    """That file once more, read while it is written."""

    def __init__(self, file: io.BytesIO) -> None:
        self._file, self._at = file, 0

    def read(self, size: int) -> bytes:
        self._at, start = self._at + size, self._at
        return bytes(self._file.getbuffer()[start : self._at])

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        ends = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.getbuffer().nbytes}
        self._at = ends[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        pass


def yuv(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``pixels`` [H,W,3] as planes [3*H/2,W] of BT.709 in its limited range, colours as the mean of 2x2 pixels.

    Written out, so that it gives the same numbers on every machine.
    """
    height, width, _ = pixels.shape
    rgb = pixels.astype(np.float32)
    red, blue = np.float32(0.2126), np.float32(0.0722)
    bright = red * rgb[..., 0] + (1 - red - blue) * rgb[..., 1] + blue * rgb[..., 2]
    mean = rgb.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    light = bright.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    colours = [(mean[..., 2] - light) / (2 - 2 * blue), (mean[..., 0] - light) / (2 - 2 * red)]
    planes = [16 + bright * np.float32(219 / 255), *(128 + each * np.float32(224 / 255) for each in colours)]
    out: NDArray[np.uint8] = np.rint(np.concatenate([each.reshape(-1) for each in planes])).astype(np.uint8)
    return out.reshape(-1, width)


class Video:
    """An MP4 that is open: ``size`` (width, height), ``text`` (its comment), and its frames, once."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._container, self._stream = container, stream
        context = stream.codec_context
        self.size: tuple[int, int] = (context.width, context.height)
        self.text: str | None = container.metadata.get("comment")
        self.planes: list[NDArray[np.uint8]] = []  #: of the frames so far, [3*H/2,W] each: what H.264 keeps exactly
        self.keep_planes = False

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        """Each frame [H,W,3], upright, and the seconds that it is shown; 0 where the file does not say."""
        for frame in self._container.decode(self._stream):
            size = (frame.width, frame.height)
            if size != self.size:
                raise ChangedSizeError(size)
            if self.keep_planes:
                planes = frame if frame.format.name == "yuv420p" else frame.reformat(format="yuv420p")
                self.planes.append(planes.to_ndarray())
            seconds = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
            quarters = round(getattr(frame, "rotation", 0) / 90) % 4  # phones store the camera's angle
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters)), seconds


class ChangedSizeError(Exception):
    """A frame has another size (width, height) than the first one."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size)
        self.size = size


@contextmanager
def opened(file: BinaryIO) -> Iterator[Video]:
    """``file`` as a video. Raises RequestError without a name of the file in it, and PyAV's errors."""
    av = library()
    with av.open(file, "r", format="mp4", options=dict(READER), metadata_errors="replace") as container:
        if not container.streams.video:
            raise RequestError("holds no video; expected an MP4 with a video in it: convert it (ffmpeg -i IN OUT.mp4)")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None or context.name not in CODECS:
            name = "an unknown codec" if context is None else context.name
            raise RequestError(f"its video is {name}; expected {', '.join(CODECS)}")
        context.options = {"max_pixels": str(MOST_PIXELS)}
        context.thread_count = 1
        yield Video(container, stream)
