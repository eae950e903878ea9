defmodule Mix.Tasks.Bombus.Download do
  @shortdoc "Downloads a model or an adapter from the Hugging Face Hub"

  @moduledoc """
  Downloads a model with its tokenizer, or an adapter, from the Hugging Face Hub into its cache, and
  writes the folder to the terminal. `{:hf, "owner/name"}` then loads it without a download.

      mix bombus.download mlx-community/Qwen3-0.6B-4bit
      mix bombus.download someone/my-adapter --revision v2

  After an interruption, the same command goes on where it ended. A token for private and gated
  repositories is taken from `HF_TOKEN`, or from what `hf auth login` has stored.

  ## Options

    * `--revision` - a branch, a tag or a commit's hash, `main` by default
    * `--subdir` - the folder within the repository
    * `--cache-dir` - the cache's folder; see `Bombus.Hub` for the default
    * `--kind` - `model`, `tokenizer`, `adapter` or `any` (default)
  """

  use Mix.Task

  alias Mix.Bombus.CommandLine

  @switches [revision: :string, subdir: :string, cache_dir: :string, kind: :string]
  @kinds ~w(model tokenizer adapter any)

  @impl true
  def run(arguments) do
    CommandLine.run("bombus.download", arguments, @switches, &download/2)
  end

  defp download(options, [id]) do
    options = Keyword.replace_lazy(options, :kind, &kind/1)
    # What downloads needs no running application.
    Mix.Task.run("app.config")
    id |> Bombus.Hub.download(options) |> Bombus.Error.unwrap!() |> Mix.shell().info()
  end

  defp download(_options, _words) do
    Mix.raise("expected one repository: mix bombus.download owner/name")
  end

  defp kind(kind) when kind in @kinds, do: String.to_atom(kind)
  defp kind(kind), do: Mix.raise("expected --kind to be one of #{inspect(@kinds)}, got: #{kind}")
end
