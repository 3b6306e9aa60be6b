"""Hugging Face's hub, which may be out of reach."""

import urllib.error
import urllib.request


def go_offline_without_a_network() -> None:
    """Have Hugging Face's libraries look into their cache alone: they would try five times, for each data set."""
    import datasets  # few have it
    import huggingface_hub

    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # somebody is there
    except OSError:
        # both have read the environment by now
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
