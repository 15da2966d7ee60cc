"""Published scores of the original Video-LLaMA (7B), for comparison.

Accuracies are fractions here and percentages in the papers. Judged scores are GPT-3.5-Turbo's of 2023 with the prompts
of Video-ChatGPT. Other judges and prompts give other scores.
"""

from typing import Any

VIDEO_CHATGPT = "Video-ChatGPT (arXiv 2306.05424, quantitative_evaluation/README.md); judge GPT-3.5-Turbo"
MVBENCH = "MVBench (arXiv 2311.17005), results on MVBench"

PUBLISHED: dict[str, dict[str, Any]] = {
    "msvd_qa": {"source": VIDEO_CHATGPT, "judged": {"match": {"accuracy": 0.516, "score": 2.5}}},
    "msrvtt_qa": {"source": VIDEO_CHATGPT, "judged": {"match": {"accuracy": 0.296, "score": 1.8}}},
    "activitynet_qa": {"source": VIDEO_CHATGPT, "judged": {"match": {"accuracy": 0.124, "score": 1.1}}},
    "video_chatgpt": {
        "source": VIDEO_CHATGPT,
        "judged": {
            "correctness": {"score": 1.96},
            "detail": {"score": 2.18},
            "context": {"score": 2.16},
            "temporal": {"score": 1.82},
            "consistency": {"score": 1.79},
        },
    },
    "mvbench": {
        "source": MVBENCH,
        "accuracy": {
            "all": 0.341,
            "action_sequence": 0.275,
            "action_prediction": 0.255,
            "action_antonym": 0.510,
            "fine_grained_action": 0.290,
            "unexpected_action": 0.390,
            "object_existence": 0.480,
            "object_interaction": 0.405,
            "object_shuffle": 0.380,
            "moving_direction": 0.225,
            "action_localization": 0.225,
            "scene_transition": 0.430,
            "action_count": 0.340,
            "moving_count": 0.225,
            "moving_attribute": 0.325,
            "state_change": 0.455,
            "fine_grained_pose": 0.325,
            "character_order": 0.400,
            "egocentric_navigation": 0.300,
            "episodic_reasoning": 0.210,
            "counterfactual_inference": 0.370,
        },
    },
}
