"""Trains nnU-Net for two short epochs from a checkpoint; run by the Python of an environment that has nnU-Net.

    python two_epochs.py nnunet|nnssl CHECKPOINT RAW WORK

`nnunet` calls what `nnUNetv2_train -pretrained_weights` calls, with the whole network. `nnssl` calls what
`nnUNetv2_preprocess_like_nnssl` and `nnUNetv2_train_pretrained` of the main branch call. RAW is a data set folder in
nnU-Net's layout. WORK gets `image.pt` (N, C, z, y, x), `features.pt` (the encoder's outputs after the checkpoint was
loaded, before any training), and `losses.json`.
"""

import json
import os
import shutil
import sys
from pathlib import Path

form = sys.argv[1]
checkpoint, raw, work = (Path(argument).resolve() for argument in sys.argv[2:5])
folders = {f"nnUNet_{name}": work / name for name in ("raw", "preprocessed", "results")}
os.environ |= {name: str(folder) for name, folder in folders.items()}
os.environ |= {"nnUNet_compile": "f", "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1"}

# These read the environment when they are imported.
import torch  # noqa: E402
from nnunetv2.experiment_planning import plan_and_preprocess_api as planning  # noqa: E402

if form == "nnssl":
    from nnunetv2.experiment_planning.like_nnssl import preprocess_like_nnssl
    from nnunetv2.run.run_training_from_pretrained import get_trainer_from_args
else:
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint


def plan_our_network(plan: dict) -> None:
    """nnU-Net's plan for the data, with the network of the checkpoint in place of its own."""
    path = folders["nnUNet_preprocessed"] / "Dataset500_Phantom" / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    configuration, architecture = plans["configurations"]["3d_fullres"], plan["architecture_plans"]
    configuration |= {"patch_size": plan["recommended_downstream_patchsize"], "batch_size": 2}
    configuration["architecture"] = {
        "network_class_name": architecture["arch_class_name"],
        "arch_kwargs": architecture["arch_kwargs"],
        "_kw_requires_import": architecture["arch_kwargs_requiring_import"],
    }
    path.write_text(json.dumps(plans))
    planning.preprocess([500], configurations=["3d_fullres"], num_processes=[1])


def prepared_trainer(plan: dict):
    """A trainer of nnU-Net whose network has the checkpoint's weights."""
    planning.extract_fingerprints([500], num_processes=1, check_dataset_integrity=False)
    planning.plan_experiments([500])
    names = ["nnUNetTrainer", "nnUNetPlans"]
    if form == "nnssl":
        preprocess_like_nnssl(500, "ours", str(checkpoint), "default_nnunet", None, 1, False)
        (plans,) = (folders["nnUNet_preprocessed"] / "Dataset500_Phantom").glob("ptPlans__ours*.json")
        names = ["PretrainedTrainer", plans.stem]
    else:
        plan_our_network(plan)
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # augment in this process
    trainer = get_trainer_from_args("500", "3d_fullres", 0, *names, device=torch.device("cpu"))
    if form == "nnssl":
        trainer.initialize()
    else:
        maybe_load_checkpoint(trainer, False, False, str(checkpoint))
    return trainer


def main() -> None:
    """Plan, load, write the encoder's features, train."""
    # Here, and not at the top, because nnU-Net's workers import this file again.
    described = Path(shutil.copytree(raw, folders["nnUNet_raw"] / "Dataset500_Phantom")) / "dataset.json"
    content = json.loads(described.read_text())
    described.write_text(json.dumps(content | {"numTraining": len(content["dataset"])}))
    plan = torch.load(checkpoint, weights_only=True)["nnssl_adaptation_plan"]
    trainer = prepared_trainer(plan)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 2, 1
    trainer.disable_checkpointing = True
    image = torch.rand(1, 1, *plan["recommended_downstream_patchsize"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.save([level.clone() for level in trainer.network.eval().encoder(image)], work / "features.pt")
    torch.save(image, work / "image.pt")
    losses: list[float] = []
    end_epoch = trainer.on_train_epoch_end

    def note_losses(outputs: list) -> None:
        """Note the mean loss of an epoch before nnU-Net goes on."""
        losses.append(float(sum(float(output["loss"]) for output in outputs) / len(outputs)))
        end_epoch(outputs)

    trainer.on_train_epoch_end = note_losses
    trainer.run_training()
    (work / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
