defmodule Bombus.Hub.Cache do
  @moduledoc false
  # What is in the cache. No link is followed but those to blobs of the same repository, which count
  # once however many revisions have them.

  @prefix "models--"

  @doc "The repositories in the folder `cache`, by their ids."
  @spec list(Path.t()) :: [Bombus.Hub.repository()]
  def list(cache) do
    for @prefix <> name = folder <- names(cache),
        path = Path.join(cache, folder),
        File.dir?(path),
        do: repository(String.replace(name, "--", "/", global: false), path)
  end

  defp repository(id, path) do
    files = files(path)

    %{
      id: id,
      kind: path |> Path.join("snapshots") |> files() |> kind(),
      revisions: revisions(path),
      size: files |> Enum.map(fn {_name, stat} -> stat.size end) |> Enum.sum(),
      path: path,
      last_used: last_used(files)
    }
  end

  defp revisions(path) do
    references = references(Path.join(path, "refs"), "")

    for commit <- names(Path.join(path, "snapshots")) do
      %{
        commit: commit,
        names: for({name, ^commit} <- references, do: name),
        path: Path.join([path, "snapshots", commit])
      }
    end
  end

  # Branches and tags; some are in folders, as refs/pr/1.
  defp references(folder, prefix) do
    Enum.flat_map(names(folder), fn name ->
      path = Path.join(folder, name)

      case File.lstat(path) do
        {:ok, %{type: :directory}} -> references(path, prefix <> name <> "/")
        {:ok, %{type: :regular, size: size}} when size < 1024 -> [{prefix <> name, commit(path)}]
        _other -> []
      end
    end)
  end

  defp commit(path) do
    with {:ok, commit} <- File.read(path), do: String.trim(commit)
  end

  # A revision has the file that tells.
  defp kind(files) do
    names = MapSet.new(files, fn {name, _stat} -> Path.basename(name) end)

    cond do
      "config.json" in names -> :model
      "adapter_config.json" in names -> :adapter
      "tokenizer.json" in names -> :tokenizer
      true -> nil
    end
  end

  # All files below, with what they take on the disk: nothing for a link.
  defp files(folder) do
    Enum.flat_map(names(folder), fn name ->
      path = Path.join(folder, name)

      case File.lstat(path, time: :posix) do
        {:ok, %{type: :directory}} -> files(path)
        {:ok, %{type: :symlink} = stat} -> [{path, %{stat | size: 0}}]
        {:ok, %{type: :regular} = stat} -> [{path, stat}]
        _other -> []
      end
    end)
  end

  # As huggingface_hub has it: when a file was last read, as far as the file system notes that.
  defp last_used(files) do
    times = for {_name, %{type: :regular} = stat} <- files, do: max(stat.atime, stat.mtime)
    newest = Enum.max(times, fn -> nil end)
    # A file system may have any number for a time.
    with time when time != nil <- newest,
         {:ok, time} <- DateTime.from_unix(time) do
      time
    else
      _none -> nil
    end
  end

  defp names(folder) do
    case File.ls(folder) do
      {:ok, names} -> Enum.sort(names)
      {:error, _reason} -> []
    end
  end
end
